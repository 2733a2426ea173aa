//! Errors of the command line: clap's message and suggestions in one line, with the help of the
//! right subcommand.

use std::ffi::OsString;

use clap::Command;
use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::error::INVALID_USAGE;
use crate::output::{self, notice};

/// The option whose value may be a pasted credential.
const SECRET: &str = "--secret ";

/// Prints help, version or a usage error, and returns the exit code.
pub fn report_usage(mut error: clap::Error, command: &Command, args: &[OsString]) -> u8 {
    let is_help = error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if is_help || !error.use_stderr() {
        output::record_failure(error.print());
        if let Err(error) = output::finish() {
            error.print();
            return error.exit_code();
        }
    } else {
        hide_secret(&mut error);
        notice!("chitin: {}", usage_line(&error, &find_subcommand(command, args)));
    }
    if error.use_stderr() { INVALID_USAGE } else { 0 }
}

/// Removes the value of `--secret` from the error.
fn hide_secret(error: &mut clap::Error) {
    let names_secret = matches!(
        error.get(ContextKind::InvalidArg),
        Some(ContextValue::String(option)) if option.starts_with(SECRET)
    );
    if names_secret {
        error.insert(ContextKind::InvalidValue, ContextValue::String("…".into()));
    }
}

/// Returns a usage error as one line: the message, the suggestions, and where the help is.
fn usage_line(error: &clap::Error, command: &str) -> String {
    let text = error.render().to_string();
    let mut paragraphs = text.split("\n\n").map(|paragraph| {
        let lines: Vec<&str> = paragraph.lines().map(str::trim).collect();
        lines.join(" ")
    });
    let message = paragraphs.next().unwrap_or_default();
    let mut line = message.trim_start_matches("error: ").to_owned();
    for tip in paragraphs.filter(|paragraph| paragraph.starts_with("tip: ")) {
        line.push_str("; ");
        line.push_str(&tip.replace(" tip: ", "; tip: "));
    }
    format!("{line}; see `{command} --help`")
}

/// Returns the words of the innermost subcommand that the arguments name.
fn find_subcommand(command: &Command, args: &[OsString]) -> String {
    let mut words = vec![command.get_name().to_owned()];
    let mut current = command;
    for arg in args.iter().skip(1).take_while(|arg| *arg != "--") {
        if let Some(inner) = arg.to_str().and_then(|name| current.find_subcommand(name)) {
            words.push(inner.get_name().to_owned());
            current = inner;
        }
    }
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::Cli;

    /// Returns the line that is printed for these arguments, which are split at spaces.
    fn line(args: &str) -> String {
        let args: Vec<OsString> =
            ["chitin"].into_iter().chain(args.split(' ')).map(Into::into).collect();
        let command = Cli::command();
        let Err(mut error) = Cli::try_parse_from(&args) else { panic!("{args:?} is valid") };
        hide_secret(&mut error);
        usage_line(&error, &find_subcommand(&command, &args))
    }

    #[test]
    fn typo_is_answered_with_a_suggestion() {
        for (args, suggestion) in [
            ("ru -- true", "'run'"),
            ("run --memroy 1G -- true", "'--memory'"),
            ("template biuld x", "'build'"),
            ("template build x --warmup y", "'--warm-up'"),
            ("policy chekc x", "'check'"),
            ("run --tier ironclw -- true", "ironclaw"),
        ] {
            let line = line(args);
            assert!(line.contains(suggestion) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn help_is_that_of_the_subcommand() {
        for (args, help) in [
            ("run --nosuch -- true", "`chitin run --help`"),
            ("run", "`chitin run --help`"),
            ("-v run --memory x -- run", "`chitin run --help`"),
            ("template build", "`chitin template build --help`"),
            ("template nosuch", "`chitin template --help`"),
            ("policy check", "`chitin policy check --help`"),
            ("nosuch", "`chitin --help`"),
            ("audit --tier nosuch", "`chitin audit --help`"),
        ] {
            let line = line(args);
            assert!(line.ends_with(&format!("; see {help}")), "{line}");
        }
    }

    #[test]
    fn value_of_a_secret_is_not_repeated() {
        for spec in ["T=sk-live-4711", "sk-live-4711", "T=env:sk-live-4711@10.0.0.1"] {
            let line = line(&format!("run --secret {spec} -- true"));
            assert!(!line.contains("4711"), "{line}");
        }
        assert!(line("run --secret T=env:T@10.0.0.1 -- true").contains("@10.0.0.1"));
    }
}
