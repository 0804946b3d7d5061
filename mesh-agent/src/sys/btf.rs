//! Where this kernel keeps the fields of its structures, out of the description of its types (BTF) that it carries.
//!
//! The document is a few MiB, and here three offsets are wanted, so it is walked once and nothing is built of it; aya, which
//! reads it too, hands out no members. Format: the kernel's `Documentation/bpf/btf.rst`. Must not know what the fields are for.

use std::{fs, io, path::PathBuf};

use mesh_common::maps::SocketLayout;

/// Where a kernel shows it.
pub(super) const PATH: &str = "/sys/kernel/btf/vmlinux";

/// What it means not to know, for whoever reads the log.
pub(super) const WITHOUT: &str =
    "a request that may not be repeated fails when it meets a connection that is just being closed";

const MAGIC: u16 = 0xeb9f;
const STRUCT: u32 = 4;
/// Octets of a type's head, and of a member of a structure.
const HEAD: usize = 12;
const MEMBER: usize = 12;

/// The offsets cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    #[error(
        "cannot read {path}, where the kernel describes its types: it was built without CONFIG_DEBUG_INFO_BTF, or sysfs is \
         not mounted"
    )]
    Read { path: PathBuf, source: io::Error },
    #[error("{PATH} is damaged, or of a later form than this program knows")]
    Damaged,
    #[error("this kernel's struct {structure} has no member {member}: it is of another make than this program knows")]
    Missing { structure: &'static str, member: &'static str },
}

/// Asks the running kernel.
///
/// # Errors
/// It does not say, or not in a form that is known here.
pub fn socket_layout() -> Result<SocketLayout, LayoutError> {
    let btf = fs::read(PATH).map_err(|source| LayoutError::Read { path: PATH.into(), source })?;
    layout_of(&btf)
}

fn layout_of(btf: &[u8]) -> Result<SocketLayout, LayoutError> {
    // A `struct sock` is the first thing in a `struct tcp_sock`.
    let wanted =
        [("tcp_sock", "copied_seq"), ("sock", "sk_receive_queue"), ("sk_buff_head", "qlen"), ("sock", "sk_socket")];
    let found = offsets(btf, &wanted).ok_or(LayoutError::Damaged)?;
    let mut at = [0; 4];
    for ((found, at), (structure, member)) in found.into_iter().zip(&mut at).zip(wanted) {
        *at = found.ok_or(LayoutError::Missing { structure, member })?;
    }
    let [copied_seq, queue, length, socket] = at;
    Ok(SocketLayout { copied_seq, queued: queue.checked_add(length).ok_or(LayoutError::Damaged)?, socket })
}

/// The offset of each (structure, member), in octets; `None` in place of one that is not there. `None` for all if the document
/// is damaged.
fn offsets<const N: usize>(btf: &[u8], wanted: &[(&str, &str); N]) -> Option<[Option<u32>; N]> {
    let word = |bytes: &[u8], at: usize| -> Option<u32> { Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?)) };
    if u16::from_ne_bytes(*btf.first_chunk()?) != MAGIC {
        return None;
    }
    let section = |at: usize| -> Option<&[u8]> {
        let body = btf.get(word(btf, 4)? as usize..)?;
        body.get(word(btf, at)? as usize..)?.get(..word(btf, at + 4)? as usize)
    };
    let (mut types, names) = (section(8)?, section(16)?);
    let named = |at: u32, name: &str| {
        let bytes = names.get(at as usize..).and_then(|rest| rest.strip_prefix(name.as_bytes()));
        bytes.is_some_and(|rest| rest.first() == Some(&0))
    };
    let mut found = [None; N];
    while !types.is_empty() {
        let (name, info) = (word(types, 0)?, word(types, 4)?);
        let (kind, many) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        let rest = types.get(HEAD..)?;
        let (body, next) = rest.split_at_checked(length(kind, many)?)?;
        types = next;
        if kind != STRUCT {
            continue;
        }
        for ((structure, member), found) in wanted.iter().zip(&mut found) {
            if found.is_some() || !named(name, structure) {
                continue;
            }
            let members = body.chunks_exact(MEMBER);
            let bits = members.filter(|it| word(it, 0).is_some_and(|at| named(at, member))).find_map(|it| word(it, 8));
            // With bit fields in the structure, the highest octet is a field's width.
            let bits = bits.map(|bits| if info >> 31 == 1 { bits & 0xff_ffff } else { bits });
            *found = bits.filter(|bits| bits % 8 == 0).map(|bits| bits / 8);
        }
    }
    Some(found)
}

/// Octets that follow the head of a type. `None`: a kind that came later, after which nothing can be found.
fn length(kind: u32, many: usize) -> Option<usize> {
    Some(match kind {
        // Pointers and modifiers, forward declarations, functions, floats, tags of types.
        2 | 7..=12 | 16 | 18 => 0,
        // Integers, variables, tags of declarations.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        // Structures, unions, sections of data, wide enumerations.
        STRUCT | 5 | 15 | 19 => many * MEMBER,
        // Enumerations, prototypes.
        6 | 13 => many * 8,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A document of structures with their members and offsets in bits.
    fn document(structures: &[(&str, &[(&str, u32)])], bitfields: bool) -> Vec<u8> {
        let mut names = vec![0u8];
        let mut name = |text: &str| {
            let at = names.len() as u32;
            names.extend(text.bytes().chain([0]));
            at
        };
        // An integer and an array before them, which have something behind their heads.
        let mut types = vec![name("int"), 1 << 24, 4, 32, 0, 3 << 24, 0, 1, 1, 4];
        for (structure, members) in structures {
            types.extend([name(structure), STRUCT << 24 | members.len() as u32 | u32::from(bitfields) << 31, 64]);
            for (member, bits) in *members {
                types.extend([name(member), 1, *bits]);
            }
        }
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let head = [24, 0, types.len() as u32, types.len() as u32, names.len() as u32];
        let mut all = [MAGIC.to_ne_bytes(), [1, 0]].concat();
        all.extend(head.iter().flat_map(|word| word.to_ne_bytes()).chain(types).chain(names));
        all
    }

    const KERNEL: [(&str, &[(&str, u32)]); 4] = [
        ("sock_common", &[("copied_seq", 8)]),
        ("sk_buff_head", &[("next", 0), ("qlen", 128)]),
        ("sock", &[("sk_receive_queue", 1600), ("sk_socket", 4800)]),
        ("tcp_sock", &[("inet_conn", 0), ("copied_seq_of_another", 64), ("copied_seq", 12000)]),
    ];

    #[test]
    fn members_are_found_with_and_without_bit_fields() {
        let expected = SocketLayout { copied_seq: 1500, queued: 216, socket: 600 };
        for bitfields in [false, true] {
            assert_eq!(layout_of(&document(&KERNEL, bitfields)).expect("found"), expected);
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = layout_of(&document(&KERNEL[..3], false)).expect_err("no tcp_sock");
        assert!(matches!(error, LayoutError::Missing { structure: "tcp_sock", member: "copied_seq" }), "{error}");
    }

    #[test]
    fn a_damaged_document_is_none() {
        let whole = document(&KERNEL, false);
        for length in 0..whole.len() {
            assert!(layout_of(&whole[..length]).is_err(), "{length} octets of {}", whole.len());
        }
        for at in 0..whole.len() {
            // Whatever it says, it says something.
            let mut damaged = whole.clone();
            damaged[at] ^= 0xff;
            drop(layout_of(&damaged));
        }
    }
}
