//! Compiles each source to an image of its own, several at a time, and only those that changed.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::architectures::{self, Architecture};
use crate::resources::{self, Resources};
use crate::search::Nvcc;

/// What to compile, and where to.
pub(crate) struct Job<'a> {
    /// The compiler.
    pub nvcc: &'a Nvcc,
    /// Folder of the sources and their headers.
    pub sources: &'a Path,
    /// Folder of the images.
    pub folder: &'a Path,
    /// Devices to compile for.
    pub architectures: &'a [Architecture],
}

/// Has cargo watch the folder of the sources and every file in it; gives the `.cu` files, by name.
pub(crate) fn watch(sources: &Path) -> Result<Vec<PathBuf>, String> {
    // A folder that is missing would be watched as "always changed".
    if !sources.is_dir() {
        return Ok(Vec::new());
    }
    println!("cargo::rerun-if-changed={}", sources.display());
    let refused = |reason: std::io::Error| format!("{}: {reason}", sources.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(sources).map_err(refused)? {
        let path = entry.map_err(refused)?.path();
        println!("cargo::rerun-if-changed={}", path.display());
        if path.extension().is_some_and(|extension| extension == "cu") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Names of the images of `files`.
pub(crate) fn names(files: &[PathBuf]) -> Vec<String> {
    files.iter().map(|file| name(file)).collect()
}

fn name(file: &Path) -> String {
    file.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

impl Job<'_> {
    /// Compiles `files`; gives what each kernel takes on the device, written to `resources.txt` too.
    pub(crate) fn run(&self, files: &[PathBuf]) -> Result<Vec<Resources>, String> {
        fs::create_dir_all(self.folder).map_err(|reason| format!("{}: {reason}", self.folder.display()))?;
        let next = AtomicUsize::new(0);
        let failures = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for _ in 0..threads().min(files.len()) {
                scope.spawn(|| {
                    while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(reason) = self.compile(file) {
                            failures.lock().expect("no thread panicked").push(reason);
                        }
                    }
                });
            }
        });
        let failures = failures.into_inner().expect("no thread panicked");
        if !failures.is_empty() {
            return Err(failures.join("\n"));
        }
        let mut all = Vec::new();
        for file in files {
            all.extend(resources::parse(&read(&self.output(file, "log"))?));
        }
        let lines: Vec<String> = all.iter().map(ToString::to_string).collect();
        write(&self.folder.join("resources.txt"), &lines.join("\n"))?;
        Ok(all)
    }

    fn compile(&self, file: &Path) -> Result<(), String> {
        let image = self.output(file, "fatbin");
        let stamp = self.output(file, "stamp");
        let arguments = self.arguments();
        let unchanged =
            fs::read_to_string(&stamp).is_ok_and(|old| self.fingerprint(file, &arguments) == Some(old));
        if unchanged && image.is_file() {
            return Ok(());
        }
        // Without its stamp a half-written image is compiled again.
        let _ = fs::remove_file(&stamp);
        let output = Command::new(&self.nvcc.program)
            .args(&arguments)
            .args([Path::new("-MF"), &self.output(file, "d"), Path::new("-o"), &image, file])
            .output()
            .map_err(|reason| format!("{}: {reason}", self.nvcc.program.display()))?;
        let log = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            return Err(format!("{} does not compile:\n{}", file.display(), log.trim_end()));
        }
        for line in log.lines().filter(|line| line.contains("warning")) {
            println!("cargo::warning={}", line.trim());
        }
        write(&self.output(file, "log"), &log)?;
        let fingerprint = self.fingerprint(file, &arguments).ok_or_else(|| {
            format!("{}: expected nvcc to list what it read", self.output(file, "d").display())
        })?;
        write(&stamp, &fingerprint)
    }

    fn arguments(&self) -> Vec<String> {
        let fixed = ["-fatbin", "-std=c++17", "-O3", "--compress-mode=size", "-Xptxas=-v", "-MD"];
        let mut arguments: Vec<String> = fixed.map(String::from).into();
        arguments.extend(architectures::arguments(self.architectures));
        arguments
    }

    /// Changes with the compiler, its arguments, and every source and header of ours that the last compilation read.
    fn fingerprint(&self, file: &Path, arguments: &[String]) -> Option<String> {
        let mut hasher = DefaultHasher::new();
        (&self.nvcc.program, self.nvcc.version, arguments).hash(&mut hasher);
        let list = fs::read_to_string(self.output(file, "d")).ok()?;
        for path in dependencies(&list).filter(|path| path.starts_with(self.sources)) {
            (&path, fs::read(&path).ok()?).hash(&mut hasher);
        }
        Some(format!("{:016x}", hasher.finish()))
    }

    fn output(&self, file: &Path, extension: &str) -> PathBuf {
        self.folder.join(format!("{}.{extension}", name(file)))
    }
}

/// The files in a rule as make reads it: "image : file file \".
fn dependencies(rule: &str) -> impl Iterator<Item = PathBuf> {
    let files = rule.split_once(" : ").map_or("", |(_, files)| files);
    files.split_whitespace().filter(|word| *word != "\\").map(PathBuf::from)
}

/// Cargo's own limit, and never more than there are processors.
fn threads() -> usize {
    let jobs = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(usize::MAX);
    jobs.min(thread::available_parallelism().map_or(1, usize::from)).max(1)
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|reason| format!("{}: {reason}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|reason| format!("{}: {reason}", path.display()))
}
