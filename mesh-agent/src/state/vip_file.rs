//! The table of virtual addresses on disk, so that a name keeps its address when the agent starts again.
//!
//! Must not know how addresses are chosen. A file that cannot be read is put aside, not fatal: hosts choose the same
//! addresses again from the names alone, unless names collided.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use mesh_core::{addr::Vip, id::ServiceName, vip::VipTable};
use serde::{Deserialize, Serialize};

/// The file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep the virtual addresses in {path}: is the state directory there and writable?")]
pub struct VipFileError {
    path: PathBuf,
    source: io::Error,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

/// Reads the table; an empty one where there is no file, or none that can be understood.
pub fn load(path: &Path) -> VipTable {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), error = %error, "cannot read the virtual addresses, choosing anew");
            }
            return VipTable::default();
        }
    };
    let entries: BTreeMap<String, Entry> = match serde_json::from_str(&text) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::warn!(path = %path.display(), error = %error, "virtual addresses are damaged, choosing anew");
            return VipTable::default();
        }
    };
    let known = entries
        .into_iter()
        .filter_map(|(name, entry)| Some((name.parse::<ServiceName>().ok()?, Vip { v4: entry.v4, v6: entry.v6 })));
    VipTable(known.collect())
}

/// Replaces the file in one step.
///
/// # Errors
/// It cannot be written.
pub fn save(path: &Path, table: &VipTable) -> Result<(), VipFileError> {
    let failed = |source| VipFileError { path: path.into(), source };
    let entries: BTreeMap<_, _> =
        table.0.iter().map(|(name, vip)| (name.as_str(), Entry { v4: vip.v4, v6: vip.v6 })).collect();
    let text = serde_json::to_vec_pretty(&entries).map_err(|error| failed(error.into()))?;
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(failed)?;
    }
    let next = path.with_extension("next");
    fs::write(&next, text).map_err(failed)?;
    fs::rename(&next, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_survives_and_damage_is_not_fatal() {
        let dir = std::env::temp_dir().join(format!("mesh-vips-{}", std::process::id()));
        let path = dir.join("vips.json");
        let mut table = VipTable::default();
        let names: Vec<ServiceName> = ["world", "cache"].iter().map(|n| n.parse().expect("a name")).collect();
        table.assign(
            names.iter(),
            "240.240.0.0/16".parse().expect("a range"),
            "fd65:6373:6d65:7368::/96".parse().expect("a range"),
        );
        save(&path, &table).expect("a writable temporary directory");
        assert_eq!(load(&path), table);
        fs::write(&path, "{").expect("writable");
        assert_eq!(load(&path), VipTable::default());
        fs::remove_dir_all(&dir).expect("ours");
        assert_eq!(load(&path), VipTable::default());
    }
}
