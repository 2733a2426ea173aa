//! `docs/images.md` lists the packages of the image.

use std::fmt::Write;
use std::fs;

use super::lock::{Lock, Pin};
use super::recipe::Recipe;
use crate::workspace::root_dir;

const START: &str = ", from here -->\n";
const END: &str = "<!-- to here -->";

/// Renders the requested packages with their reasons, and the rest by name and version.
fn render_tables(recipe: &Recipe, lock: &Lock) -> String {
    let mut text = String::from("\n| package | version | reason |\n|---|---|---|\n");
    let reason = |pin: &Pin| recipe.package.iter().find(|package| package.name == pin.name);
    for pin in &lock.pins {
        if let Some(package) = reason(pin) {
            writeln!(text, "| `{}` | {} | {} |", pin.name, pin.version, package.why).unwrap();
        }
    }
    text.push_str("\nTheir dependencies:\n\n| package | version |\n|---|---|\n");
    for pin in lock.pins.iter().filter(|pin| reason(pin).is_none()) {
        writeln!(text, "| `{}` | {} |", pin.name, pin.version).unwrap();
    }
    text.push('\n');
    text
}

#[test]
fn packages_are_documented() {
    let read = |path: &str| fs::read_to_string(root_dir().join(path)).unwrap();
    let recipe = Recipe::parse(&read("rootfs/recipe.toml")).unwrap();
    let lock = Lock::parse(&read("rootfs/packages.lock")).unwrap();
    lock.check_against(&recipe).unwrap();
    let document = read("docs/images.md");
    let (start, rest) = document.split_once(START).unwrap();
    let (documented, end) = rest.split_once(END).unwrap();
    let tables = render_tables(&recipe, &lock);
    if std::env::var_os("CHITIN_BLESS").is_some() {
        let blessed = format!("{start}{START}{tables}{END}{end}");
        fs::write(root_dir().join("docs/images.md"), blessed).unwrap();
    } else {
        assert!(
            documented == tables,
            "bless it: CHITIN_BLESS=1 cargo nextest run -p xtask packages_are_documented"
        );
    }
}
