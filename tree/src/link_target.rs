/// Returns true if a link with this target, in a directory `depth` levels below the root of its
/// tree, may lead out of the tree.
///
/// Only leading `..` components are counted. A `..` after a name counts as leading out, because the
/// name may itself be a link, and its `..` is then not the directory that contains it: `a/up -> ..`
/// makes `a/up/..` climb twice. Leading ones start from a directory that was received, which is
/// never a link. Each link by itself therefore stays inside, and so does any chain of them.
pub(crate) fn may_escape(depth: usize, target: &[u8]) -> bool {
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
