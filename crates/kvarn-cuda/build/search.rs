//! Where the compiler is: variables first, then the wheels in a Python environment, then the path.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Distribution, pinned version, and a file that it installs below `nvidia/cu13`.
pub(crate) const WHEELS: [(&str, &str, &str); 5] = [
    ("nvidia-cuda-nvcc", "13.0.88", "bin/nvcc"),
    ("nvidia-nvvm", "13.0.88", "nvvm/bin/cicc"),
    ("nvidia-cuda-crt", "13.0.88", "include/crt/host_config.h"),
    ("nvidia-cuda-runtime", "13.0.96", "include/cuda_runtime.h"),
    ("nvidia-cuda-cccl", "13.0.85", "include/cccl"),
];

/// What the search found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// A folder of images that were compiled before.
    Images(PathBuf),
    /// A compiler.
    Nvcc(Nvcc),
}

/// A compiler that was asked for its version.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Nvcc {
    /// The program.
    pub program: PathBuf,
    /// Release of CUDA, as in (13, 0).
    pub version: (u32, u32),
}

/// All that the search looks at, so that tests can make it up.
pub(crate) struct Surroundings<'a> {
    /// Root of the workspace.
    pub root: PathBuf,
    /// Reads an environment variable.
    pub variable: &'a dyn Fn(&str) -> Option<OsString>,
    /// The folders of `nvidia.cu13` that a Python interpreter imports from.
    pub cuda_of_python: &'a dyn Fn(&Path) -> Vec<PathBuf>,
    /// What `nvcc --version` prints, or why it could not.
    pub version_text: &'a dyn Fn(&Path) -> Result<String, String>,
}

impl Surroundings<'_> {
    /// Those of this process.
    pub(crate) fn of_process(root: PathBuf) -> Self {
        Self {
            root,
            variable: &|name| std::env::var_os(name).filter(|value| !value.is_empty()),
            cuda_of_python: &cuda_of_python,
            version_text: &version_text,
        }
    }
}

/// Looks in this order: `KVARN_FATBIN`, `KVARN_NVCC`, `CUDA_HOME`, the wheels seen by `PYO3_PYTHON`,
/// `$VIRTUAL_ENV/bin/python`, `.venv/bin/python` and `python3`, the path.
///
/// A variable that is set decides: what it names must be there.
pub(crate) fn find(around: &Surroundings<'_>) -> Result<Found, String> {
    let variable = around.variable;
    if let Some(folder) = variable("KVARN_FATBIN").map(PathBuf::from) {
        return Ok(Found::Images(folder));
    }
    if let Some(program) = variable("KVARN_NVCC").map(PathBuf::from) {
        return named("KVARN_NVCC", &program, &program, around);
    }
    if let Some(home) = variable("CUDA_HOME").map(PathBuf::from) {
        return named("CUDA_HOME", &home, &home.join("bin/nvcc"), around);
    }
    for python in interpreters(around) {
        for folder in (around.cuda_of_python)(&python) {
            // The CUDA build of torch fills the same folder, without the compiler.
            if folder.join("bin/nvcc").is_file() {
                return in_wheels(&folder, &python, around);
            }
        }
    }
    for folder in variable("PATH").iter().flat_map(std::env::split_paths) {
        let program = folder.join("nvcc");
        if program.is_file() {
            return named("PATH", &folder, &program, around);
        }
    }
    let wheels: Vec<String> = WHEELS.iter().map(|(name, version, _)| format!("{name}=={version}")).collect();
    Err(format!(
        "no nvcc: expected the CUDA compiler, for the kernels in cuda/; install it into the Python environment with \
         `pip install {}`, or set KVARN_NVCC or CUDA_HOME",
        wheels.join(" ")
    ))
}

fn interpreters(around: &Surroundings<'_>) -> Vec<PathBuf> {
    let mut list = Vec::new();
    list.extend((around.variable)("PYO3_PYTHON").map(PathBuf::from));
    list.extend((around.variable)("VIRTUAL_ENV").map(|folder| PathBuf::from(folder).join("bin/python")));
    list.push(around.root.join(".venv/bin/python"));
    list.push("python3".into());
    list
}

fn named(variable: &str, value: &Path, program: &Path, around: &Surroundings<'_>) -> Result<Found, String> {
    if !program.is_file() {
        return Err(format!(
            "{variable}={}: expected {} to be there; correct the variable, or unset it",
            value.display(),
            program.display()
        ));
    }
    asked(program, around)
}

fn in_wheels(folder: &Path, python: &Path, around: &Surroundings<'_>) -> Result<Found, String> {
    let missing: Vec<String> = WHEELS
        .iter()
        .filter(|(_, _, file)| !folder.join(file).exists())
        .map(|(name, version, _)| format!("{name}=={version}"))
        .collect();
    if !missing.is_empty() {
        return Err(format!(
            "nvcc in {} without {}: expected all five wheels of the compiler; install the missing ones for {}",
            folder.display(),
            missing.join(" and "),
            python.display()
        ));
    }
    asked(&folder.join("bin/nvcc"), around)
}

fn asked(program: &Path, around: &Surroundings<'_>) -> Result<Found, String> {
    let text = (around.version_text)(program)
        .map_err(|reason| format!("{}: expected a program that runs; {reason}", program.display()))?;
    let version = release(&text).ok_or_else(|| {
        format!("{} --version printed {text:?}: expected a release; use nvcc of CUDA 13", program.display())
    })?;
    if version < (13, 0) {
        return Err(format!(
            "{} of CUDA {}.{}: expected 13.0 or newer; install the pinned wheels",
            program.display(),
            version.0,
            version.1
        ));
    }
    Ok(Found::Nvcc(Nvcc { program: program.into(), version }))
}

/// Reads "… release 13.0, V13.0.88".
fn release(text: &str) -> Option<(u32, u32)> {
    let (version, _) = text.split_once("release ")?.1.split_once(',')?;
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn cuda_of_python(python: &Path) -> Vec<PathBuf> {
    // `nvidia` is a namespace package: it may lie in several places, one a line.
    let script = "import nvidia.cu13 as cuda; print(*cuda.__path__, sep='\\n')";
    let output = Command::new(python).args(["-c", script]).output();
    output.map_or_else(
        |_| Vec::new(),
        |output| String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect(),
    )
}

fn version_text(program: &Path) -> Result<String, String> {
    let output = Command::new(program).arg("--version").output().map_err(|reason| reason.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
