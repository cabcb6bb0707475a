//! The images of a build: the manifest beside them, and the Rust source that embeds them.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use crate::architectures::{self, Architecture};

/// Images in a folder, and what they are for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Images {
    /// Release of the CUDA compiler.
    pub toolkit: (u32, u32),
    /// Devices they were compiled for.
    pub architectures: Vec<Architecture>,
    /// Where the files `NAME.fatbin` lie.
    pub folder: PathBuf,
    /// Their names.
    pub names: Vec<String>,
}

impl Images {
    /// Writes what [`read`] needs to use the folder in another build.
    pub(crate) fn write_manifest(&self) -> Result<(), String> {
        let architectures: Vec<String> = self.architectures.iter().map(ToString::to_string).collect();
        let (major, minor) = self.toolkit;
        let mut text = format!("toolkit {major}.{minor}\narchitectures {}\n", architectures.join(";"));
        for name in &self.names {
            let _ = writeln!(text, "image {name}");
        }
        let path = self.folder.join("manifest.txt");
        fs::write(&path, text).map_err(|reason| format!("{}: {reason}", path.display()))
    }
}

/// Reads the images that `KVARN_FATBIN` names: a folder that an earlier build left as `images` in its output.
pub(crate) fn read(folder: &Path) -> Result<Images, String> {
    let path = folder.join("manifest.txt");
    println!("cargo::rerun-if-changed={}", path.display());
    let wrong = |what: &str| {
        format!(
            "KVARN_FATBIN={}: {what}; point it to the folder `images` of a build, or unset it",
            folder.display()
        )
    };
    let text = fs::read_to_string(&path)
        .map_err(|reason| wrong(&format!("expected a folder with manifest.txt, but {reason}")))?;
    let mut images = Images { folder: folder.canonicalize().unwrap_or_default(), ..Images::default() };
    for line in text.lines() {
        let unknown =
            || wrong(&format!("line {line:?} of manifest.txt: expected toolkit, architectures or image"));
        match line.split_once(' ').ok_or_else(unknown)? {
            ("toolkit", version) => {
                let parts = version.split_once('.').ok_or_else(unknown)?;
                let number = |text: &str| text.parse().map_err(|_| unknown());
                images.toolkit = (number(parts.0)?, number(parts.1)?);
            }
            ("architectures", list) => images.architectures = architectures::parse(list)?,
            ("image", name) => {
                let image = folder.join(format!("{name}.fatbin"));
                println!("cargo::rerun-if-changed={}", image.display());
                if !image.is_file() {
                    return Err(wrong(&format!("expected {name}.fatbin, which manifest.txt lists")));
                }
                images.names.push(name.into());
            }
            _ => return Err(unknown()),
        }
    }
    if images.names.is_empty() || images.architectures.is_empty() {
        return Err(wrong("expected manifest.txt to list architectures and images"));
    }
    Ok(images)
}

/// Writes `images.rs` into `out`.
pub(crate) fn write(out: &Path, images: &Images) -> Result<(), String> {
    let (major, minor) = images.toolkit;
    let mut text =
        format!("static EMBEDDED: Images = Images {{\n    toolkit: Version::new({major}, {minor}),\n");
    let _ = writeln!(text, "    architectures: &[");
    for Architecture { number, ptx } in &images.architectures {
        let _ = writeln!(text, "        Architecture {{ number: {number}, ptx: {ptx} }},");
    }
    let _ = writeln!(text, "    ],\n    list: &[");
    for name in &images.names {
        let path = images.folder.join(format!("{name}.fatbin")).display().to_string();
        let _ = writeln!(
            text,
            "        Image {{ name: {name:?}, bytes: &Aligned(*include_bytes!({path:?})).0 }},"
        );
    }
    text.push_str("    ],\n};\n");
    let path = out.join("images.rs");
    fs::write(&path, text).map_err(|reason| format!("{}: {reason}", path.display()))
}
