//! YAML to a tree of nodes that know where they stand, with everything refused that makes one text mean another: anchors and
//! aliases (and with them any bomb), tags, directives, a second document, a key given twice.

use std::fmt;

use granit_parser::{Event, Marker, Parser, ScalarStyle, Span};

/// A file of policies that says much fits a few KiB. Read no further: the parser's own memory grows with the text.
pub const MAX_BYTES: u64 = 64 * 1024;

/// Deepest nesting: the format itself needs 5.
const MAX_DEPTH: usize = 16;

/// A place in the file, both counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Line.
    pub line: usize,
    /// Column, in characters.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

impl From<&Marker> for Place {
    fn from(marker: &Marker) -> Place {
        Place { line: marker.line(), column: marker.col() + 1 }
    }
}

/// What is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub place: Place,
    pub what: String,
}

impl Problem {
    pub fn new(place: Place, what: impl Into<String>) -> Problem {
        Problem { place, what: what.into() }
    }
}

/// One value.
#[derive(Debug, PartialEq, Eq)]
pub struct Node {
    pub place: Place,
    pub value: Value,
}

/// What a value is, by the core schema of YAML 1.2 without its other bases and its floats, which nothing here takes.
#[derive(Debug, PartialEq, Eq)]
pub enum Value {
    Null,
    Bool(bool),
    Integer(i64),
    String(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// The key of a map.
#[derive(Debug, PartialEq, Eq)]
pub struct Key {
    pub place: Place,
    pub name: String,
}

impl Node {
    /// The place of what stands at this path of keys, or of what stands nearest above it.
    pub fn place_of(&self, path: &[&str]) -> Place {
        let Some((first, rest)) = path.split_first() else { return self.place };
        match &self.value {
            Value::Map(entries) => match entries.iter().find(|(key, _)| key.name == *first) {
                Some((_, node)) => node.place_of(rest),
                None => self.place,
            },
            Value::List(items) => {
                match first.parse::<usize>().ok().and_then(|index| items.get(index)) {
                    Some(node) => node.place_of(rest),
                    None => self.place,
                }
            }
            _ => self.place,
        }
    }
}

/// A list or map that is not complete yet.
enum Open {
    List(Place, Vec<Node>),
    Map(Place, Vec<(Key, Node)>, Option<Key>),
}

/// Reads one document.
pub fn read(text: &str) -> Result<Node, Problem> {
    let options = granit_parser::options! {
        disallow_directives: true,
        strict_indentation: true,
        emit_unresolved_aliases: true,
        flow_nesting_limit: MAX_DEPTH,
        block_nesting_limit: MAX_DEPTH,
    };
    let mut stack: Vec<Open> = Vec::new();
    let mut root = None;
    for event in Parser::new_from_str_with_options(text, options) {
        let (event, span) =
            event.map_err(|error| Problem::new(Place::from(error.marker()), error.info()))?;
        let place = Place::from(&span.start);
        let node = match event {
            Event::DocumentStart(..) if root.is_some() => {
                return Err(Problem::new(place, "a second document: a policy is one"));
            }
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                return Err(Problem::new(
                    place,
                    "an alias: write the value out, nothing here stands for something else",
                ));
            }
            Event::Scalar(text, style, anchor, tag) => {
                plain(&span, anchor, tag.is_some())?;
                check_characters(&text, place)?;
                Node { place, value: scalar(&text, style) }
            }
            Event::SequenceStart(_, anchor, tag) => {
                plain(&span, anchor, tag.is_some())?;
                open(&mut stack, Open::List(place, Vec::new()))?;
                continue;
            }
            Event::MappingStart(_, anchor, tag) => {
                plain(&span, anchor, tag.is_some())?;
                open(&mut stack, Open::Map(place, Vec::new(), None))?;
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match stack.pop() {
                Some(Open::List(place, items)) => Node { place, value: Value::List(items) },
                Some(Open::Map(place, entries, _)) => Node { place, value: Value::Map(entries) },
                None => continue,
            },
            _ => continue,
        };
        match stack.last_mut() {
            None => root = Some(node),
            Some(Open::List(_, items)) => items.push(node),
            Some(Open::Map(_, entries, pending)) => match pending.take() {
                Some(key) => entries.push((key, node)),
                None => *pending = Some(key(node, entries)?),
            },
        }
    }
    root.filter(|node| node.value != Value::Null).ok_or_else(|| {
        Problem::new(Place { line: 1, column: 1 }, "the file is empty: a policy says something")
    })
}

fn open(stack: &mut Vec<Open>, what: Open) -> Result<(), Problem> {
    let (Open::List(place, _) | Open::Map(place, ..)) = &what;
    if stack.len() >= MAX_DEPTH {
        return Err(Problem::new(*place, format!("nested deeper than {MAX_DEPTH} levels")));
    }
    if let Some(Open::Map(_, _, None)) = stack.last() {
        return Err(Problem::new(*place, "a key that is no word"));
    }
    stack.push(what);
    Ok(())
}

/// Refuses what is in front of a node.
fn plain(span: &Span, anchor: usize, tag: bool) -> Result<(), Problem> {
    let place = Place::from(span.tag_start.as_ref().unwrap_or(&span.start));
    match (tag, anchor) {
        (true, _) => Err(Problem::new(place, "a tag: types follow from the field, drop the `!…`")),
        (_, 1..) => Err(Problem::new(place, "an anchor: drop the `&…`, nothing may refer to it")),
        _ => Ok(()),
    }
}

/// Nothing in a policy has a use for them, and a terminal or a path would obey them.
fn check_characters(text: &str, place: Place) -> Result<(), Problem> {
    match text.chars().find(|c| c.is_control()) {
        Some('\0') => Err(Problem::new(place, "a NUL byte in a text")),
        Some(c) => Err(Problem::new(
            place,
            format!("a control character, {}, in a text", c.escape_default()),
        )),
        None => Ok(()),
    }
}

fn scalar(text: &str, style: ScalarStyle) -> Value {
    if style != ScalarStyle::Plain {
        return Value::String(text.to_owned());
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        _ => match text.parse() {
            Ok(number) => Value::Integer(number),
            Err(_) => Value::String(text.to_owned()),
        },
    }
}

fn key(node: Node, entries: &[(Key, Node)]) -> Result<Key, Problem> {
    let place = node.place;
    let Value::String(name) = node.value else {
        return Err(Problem::new(place, "a key that is no word"));
    };
    match entries.iter().find(|(other, _)| other.name == name) {
        Some((first, _)) => Err(Problem::new(
            place,
            format!("`{name}` is given twice, first in line {}", first.place.line),
        )),
        None => Ok(Key { place, name }),
    }
}
