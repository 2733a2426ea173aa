//! Parses YAML into a tree of nodes with their locations.
//!
//! Everything that lets one text mean another is refused: anchors and aliases (and with them any
//! expansion bomb), tags, directives, a second document, a duplicate key.

use std::fmt;

use chitin_text::is_invisible;
use granit_parser::{Event, Marker, Parser, ScalarStyle, Span};

/// Largest policy file. A long policy takes a few KiB, and the parser's memory grows with the text.
pub const MAX_BYTES: u64 = 64 * 1024;

/// Deepest nesting. The format itself needs 5 levels.
const MAX_DEPTH: usize = 16;

/// A position in the file. Lines and columns count from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    /// Line.
    pub line: usize,
    /// Column, in characters.
    pub column: usize,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

impl From<&Marker> for Location {
    fn from(marker: &Marker) -> Location {
        Location { line: marker.line(), column: marker.col() + 1 }
    }
}

/// A diagnostic: a location and a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    pub location: Location,
    pub message: String,
}

impl Diagnostic {
    pub fn new(location: Location, message: impl Into<String>) -> Diagnostic {
        Diagnostic { location, message: message.into() }
    }
}

/// A value and its location.
#[derive(Debug, PartialEq, Eq)]
pub struct Node {
    pub location: Location,
    pub value: Value,
}

/// A value by the core schema of YAML 1.2, without other bases and floats, which no field accepts.
#[derive(Debug, PartialEq, Eq)]
pub enum Value {
    Null,
    Bool(bool),
    Integer(i64),
    String(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A key of a map.
#[derive(Debug, PartialEq, Eq)]
pub struct Key {
    pub location: Location,
    pub name: String,
}

impl Node {
    /// Returns the location of the node at a path of keys and indices, or of its nearest ancestor.
    pub fn locate(&self, path: &[&str]) -> Location {
        let Some((first, rest)) = path.split_first() else { return self.location };
        match &self.value {
            Value::Map(entries) => match entries.iter().find(|(key, _)| key.name == *first) {
                Some((_, node)) => node.locate(rest),
                None => self.location,
            },
            Value::List(items) => {
                match first.parse::<usize>().ok().and_then(|index| items.get(index)) {
                    Some(node) => node.locate(rest),
                    None => self.location,
                }
            }
            _ => self.location,
        }
    }
}

/// An incomplete list or map.
enum Open {
    List(Location, Vec<Node>),
    /// The key waits for its value.
    Map(Location, Vec<(Key, Node)>, Option<Key>),
}

/// Parses one document.
pub fn parse_document(text: &str) -> Result<Node, Diagnostic> {
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
            event.map_err(|error| Diagnostic::new(Location::from(error.marker()), error.info()))?;
        let location = Location::from(&span.start);
        let node = match event {
            Event::DocumentStart(..) if root.is_some() => {
                return Err(Diagnostic::new(location, "second document: a policy file has one"));
            }
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                return Err(Diagnostic::new(
                    location,
                    "aliases are not allowed: write the value out",
                ));
            }
            Event::Scalar(text, style, anchor, tag) => {
                refuse_properties(&span, anchor, tag.is_some())?;
                check_characters(&text, location)?;
                Node { location, value: parse_scalar(&text, style) }
            }
            Event::SequenceStart(_, anchor, tag) => {
                refuse_properties(&span, anchor, tag.is_some())?;
                push_open(&mut stack, Open::List(location, Vec::new()))?;
                continue;
            }
            Event::MappingStart(_, anchor, tag) => {
                refuse_properties(&span, anchor, tag.is_some())?;
                push_open(&mut stack, Open::Map(location, Vec::new(), None))?;
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match stack.pop() {
                Some(Open::List(location, items)) => Node { location, value: Value::List(items) },
                Some(Open::Map(location, entries, _)) => {
                    Node { location, value: Value::Map(entries) }
                }
                None => continue,
            },
            _ => continue,
        };
        match stack.last_mut() {
            None => root = Some(node),
            Some(Open::List(_, items)) => items.push(node),
            Some(Open::Map(_, entries, pending)) => match pending.take() {
                Some(key) => entries.push((key, node)),
                None => *pending = Some(take_key(node, entries)?),
            },
        }
    }
    root.filter(|node| node.value != Value::Null)
        .ok_or_else(|| Diagnostic::new(Location { line: 1, column: 1 }, "the file is empty"))
}

fn push_open(stack: &mut Vec<Open>, node: Open) -> Result<(), Diagnostic> {
    let (Open::List(location, _) | Open::Map(location, ..)) = &node;
    if stack.len() >= MAX_DEPTH {
        return Err(Diagnostic::new(*location, format!("nested deeper than {MAX_DEPTH} levels")));
    }
    if let Some(Open::Map(_, _, None)) = stack.last() {
        return Err(Diagnostic::new(*location, "a key must be a string"));
    }
    stack.push(node);
    Ok(())
}

/// Refuses a tag or an anchor in front of a node.
fn refuse_properties(span: &Span, anchor: usize, tag: bool) -> Result<(), Diagnostic> {
    let location = Location::from(span.tag_start.as_ref().unwrap_or(&span.start));
    match (tag, anchor) {
        (true, _) => Err(Diagnostic::new(
            location,
            "tags are not allowed: remove the `!…`, each field has one type",
        )),
        (_, 1..) => Err(Diagnostic::new(location, "anchors are not allowed: remove the `&…`")),
        _ => Ok(()),
    }
}

/// Refuses control characters, invisible ones, and those that change the direction of text. A
/// terminal or a path would obey them, and a command would look like another one to the person who
/// is asked to consent to it.
fn check_characters(text: &str, location: Location) -> Result<(), Diagnostic> {
    match text.chars().find(|c| c.is_control() || is_invisible(*c)) {
        Some('\0') => Err(Diagnostic::new(location, "a string must not hold a NUL byte")),
        Some(c) => Err(Diagnostic::new(
            location,
            format!("a string must not hold the control character {}", c.escape_default()),
        )),
        None => Ok(()),
    }
}

fn parse_scalar(text: &str, style: ScalarStyle) -> Value {
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

fn take_key(node: Node, entries: &[(Key, Node)]) -> Result<Key, Diagnostic> {
    let location = node.location;
    let Value::String(name) = node.value else {
        return Err(Diagnostic::new(location, "a key must be a string"));
    };
    match entries.iter().find(|(other, _)| other.name == name) {
        Some((first, _)) => Err(Diagnostic::new(
            location,
            format!("duplicate key `{name}`, first in line {}", first.location.line),
        )),
        None => Ok(Key { location, name }),
    }
}
