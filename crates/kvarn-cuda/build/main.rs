//! Compiles every `cuda/*.cu` to an image and writes the table that embeds them.

mod architectures;
mod compile;
mod resources;
mod search;
mod table;

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use search::{Found, Surroundings};

/// Inputs that are watched. `PYO3_PYTHON` and `VIRTUAL_ENV` only say where nvcc may lie: watching them would compile
/// every kernel again whenever cargo and maturin take turns.
const WATCHED: [&str; 5] =
    ["KVARN_FATBIN", "KVARN_NVCC", "CUDA_HOME", "KVARN_CUDA_ARCHS", "KVARN_DENY_SPILLS"];

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            println!("cargo::error={}", reason.replace('\n', "\ncargo::error="));
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is unset: expected cargo to set it")?);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let root = root.canonicalize().map_err(|reason| format!("{}: {reason}", root.display()))?;
    let sources = root.join("cuda");
    println!("cargo::rerun-if-changed=build");
    for name in WATCHED {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let files = compile::watch(&sources)?;
    if files.is_empty() && env::var_os("KVARN_FATBIN").is_none() {
        return table::write(&out, &table::Images::default());
    }
    let images = match search::find(&Surroundings::of_process(root))? {
        Found::Images(folder) => table::read(&folder)?,
        Found::Nvcc(nvcc) => {
            let list = env::var("KVARN_CUDA_ARCHS").unwrap_or_else(|_| architectures::DEFAULT.into());
            let architectures = architectures::parse(&list)?;
            let folder = out.join("images");
            let job = compile::Job {
                nvcc: &nvcc,
                sources: &sources,
                folder: &folder,
                architectures: &architectures,
            };
            let resources = job.run(&files)?;
            check_spills(&resources)?;
            let images =
                table::Images { toolkit: nvcc.version, architectures, folder, names: compile::names(&files) };
            images.write_manifest()?;
            images
        }
    };
    table::write(&out, &images)
}

/// A spilled register costs a kernel more than any other mistake that compiles, so each is a warning, or an error with
/// `KVARN_DENY_SPILLS=1`.
fn check_spills(resources: &[resources::Resources]) -> Result<(), String> {
    let spilled: Vec<String> =
        resources.iter().filter(|kernel| kernel.spills()).map(ToString::to_string).collect();
    for line in &spilled {
        println!("cargo::warning={line}");
    }
    if !spilled.is_empty() && env::var("KVARN_DENY_SPILLS").is_ok_and(|value| value == "1") {
        return Err(format!(
            "{} kernels spill registers: expected none with KVARN_DENY_SPILLS=1; lower their register use\n{}",
            spilled.len(),
            spilled.join("\n")
        ));
    }
    Ok(())
}
