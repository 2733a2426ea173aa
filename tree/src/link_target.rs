/// Whether a link with this target, in a directory `depth` levels below the root of its tree, may lead out of it.
///
/// Only leading `..` are counted, and one after a name counts as leading out: the name may be a link itself, and
/// then its `..` is not the directory it stands in (`a/up -> ..` makes `a/up/..` climb twice). Leading ones are
/// taken from a directory that was received, which is never a link. So each link by itself stays inside, and with
/// that any chain of them.
pub(crate) fn escapes(depth: usize, target: &[u8]) -> bool {
    if target.starts_with(b"/") {
        return true;
    }
    let mut climbed = 0;
    let mut named = false;
    for component in target.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." if named || climbed == depth => return true,
            b".." => climbed += 1,
            _ => named = true,
        }
    }
    false
}

#[cfg(test)]
#[path = "link_target_test.rs"]
mod tests;
