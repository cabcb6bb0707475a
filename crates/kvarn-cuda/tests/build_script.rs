//! The build script's decisions: which compiler, which devices, what the compiler said, what is embedded.

// The script uses all of it.
#![allow(dead_code)]

#[path = "../build/architectures.rs"]
mod architectures;
#[path = "../build/resources.rs"]
mod resources;
#[path = "../build/search.rs"]
mod search;
#[path = "../build/table.rs"]
mod table;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use search::{Found, Nvcc, Surroundings, WHEELS};
use table::Images;

/// A folder of its own for each test.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn touch(file: &Path) -> PathBuf {
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(file, "").unwrap();
    file.into()
}

/// A machine with these variables, on which each interpreter imports the wheels from one folder.
#[derive(Default)]
struct Machine {
    root: PathBuf,
    variables: HashMap<&'static str, OsString>,
    wheels: HashMap<PathBuf, PathBuf>,
    version: Option<&'static str>,
}

impl Machine {
    fn set(&mut self, name: &'static str, value: &Path) {
        self.variables.insert(name, value.into());
    }

    fn unset(&mut self, name: &str) {
        self.variables.remove(name);
    }

    fn find(&self) -> Result<Found, String> {
        search::find(&Surroundings {
            root: self.root.clone(),
            variable: &|name| self.variables.get(name).cloned(),
            cuda_of_python: &|python| self.wheels.get(python).cloned().into_iter().collect(),
            version_text: &|_| {
                Ok(self.version.unwrap_or("Cuda compilation tools, release 13.0, V13.0.88\n").into())
            },
        })
    }

    fn program(&self) -> PathBuf {
        match self.find() {
            Ok(Found::Nvcc(nvcc)) => nvcc.program,
            other => panic!("{other:?}"),
        }
    }
}

/// The five wheels, installed.
fn wheels(folder: &Path) -> PathBuf {
    for (_, _, file) in WHEELS {
        touch(&folder.join(file));
    }
    folder.into()
}

#[test]
fn the_search_takes_the_first_of_the_documented_order() {
    let folder = folder("order");
    let mut machine = Machine { root: folder.join("root"), ..Machine::default() };
    machine.set("PATH", &folder.join("path"));
    touch(&folder.join("path/nvcc"));
    let (named, virtual_env) = (folder.join("named/python"), folder.join("env"));
    for (python, place) in [
        (named.clone(), "of_named"),
        (virtual_env.join("bin/python"), "of_env"),
        (folder.join("root/.venv/bin/python"), "of_root"),
        ("python3".into(), "of_python3"),
    ] {
        machine.wheels.insert(python, wheels(&folder.join(place)));
    }
    machine.set("KVARN_FATBIN", &folder.join("images"));
    machine.set("KVARN_NVCC", &touch(&folder.join("mine/nvcc")));
    machine.set("CUDA_HOME", &folder.join("home"));
    touch(&folder.join("home/bin/nvcc"));
    machine.set("PYO3_PYTHON", &named);
    machine.set("VIRTUAL_ENV", &virtual_env);

    assert_eq!(machine.find(), Ok(Found::Images(folder.join("images"))));
    machine.unset("KVARN_FATBIN");
    assert_eq!(machine.find(), Ok(Found::Nvcc(Nvcc { program: folder.join("mine/nvcc"), version: (13, 0) })));
    machine.unset("KVARN_NVCC");
    assert_eq!(machine.program(), folder.join("home/bin/nvcc"));
    machine.unset("CUDA_HOME");
    assert_eq!(machine.program(), folder.join("of_named/bin/nvcc"));
    machine.unset("PYO3_PYTHON");
    assert_eq!(machine.program(), folder.join("of_env/bin/nvcc"));
    machine.unset("VIRTUAL_ENV");
    assert_eq!(machine.program(), folder.join("of_root/bin/nvcc"));
    machine.wheels.remove(&folder.join("root/.venv/bin/python"));
    assert_eq!(machine.program(), folder.join("of_python3/bin/nvcc"));
    machine.wheels.clear();
    assert_eq!(machine.program(), folder.join("path/nvcc"));
    machine.unset("PATH");
    assert_eq!(
        machine.find().unwrap_err(),
        "no nvcc: expected the CUDA compiler, for the kernels in cuda/; install it into the Python environment with \
         `pip install nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
         nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85`, or set KVARN_NVCC or CUDA_HOME"
    );
}

#[test]
fn an_environment_without_the_compiler_is_passed_over() {
    // As torch leaves it: the same folder, headers and libraries only.
    let folder = folder("torch");
    touch(&folder.join("torch/include/cuda_runtime.h"));
    let mut machine = Machine { root: folder.clone(), ..Machine::default() };
    machine.set("PYO3_PYTHON", Path::new("with_torch"));
    machine.wheels.insert("with_torch".into(), folder.join("torch"));
    machine.wheels.insert("python3".into(), wheels(&folder.join("wheels")));
    assert_eq!(machine.program(), folder.join("wheels/bin/nvcc"));
}

#[test]
fn a_missing_wheel_is_named() {
    let folder = folder("missing");
    let place = wheels(&folder.join("wheels"));
    fs::remove_file(place.join("nvvm/bin/cicc")).unwrap();
    fs::remove_file(place.join("include/cccl")).unwrap();
    let mut machine = Machine { root: folder, ..Machine::default() };
    machine.wheels.insert("python3".into(), place.clone());
    assert_eq!(
        machine.find().unwrap_err(),
        format!(
            "nvcc in {} without nvidia-nvvm==13.0.88 and nvidia-cuda-cccl==13.0.85: expected all five wheels of the \
             compiler; install the missing ones for python3",
            place.display()
        )
    );
}

#[test]
fn a_variable_that_points_nowhere_is_an_error() {
    for (name, file) in [("KVARN_NVCC", ""), ("CUDA_HOME", "/bin/nvcc")] {
        let mut machine = Machine::default();
        machine.wheels.insert("python3".into(), wheels(&folder("nowhere")));
        machine.set(name, Path::new("/nowhere"));
        assert_eq!(
            machine.find().unwrap_err(),
            format!(
                "{name}=/nowhere: expected /nowhere{file} to be there; correct the variable, or unset it"
            )
        );
    }
}

#[test]
fn the_wheels_are_those_of_the_python_package() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../pyproject.toml");
    let text = fs::read_to_string(path).unwrap();
    for (name, version, _) in WHEELS {
        // For an isolated build, and in the group for a build in place.
        assert_eq!(text.matches(&format!("    \"{name}=={version}\",\n")).count(), 2, "{name}");
    }
}

#[test]
fn an_old_compiler_is_refused() {
    let mut machine =
        Machine { version: Some("Cuda compilation tools, release 12.9, V12.9.86"), ..Machine::default() };
    let nvcc = touch(&folder("old").join("nvcc"));
    machine.set("KVARN_NVCC", &nvcc);
    assert_eq!(
        machine.find().unwrap_err(),
        format!("{} of CUDA 12.9: expected 13.0 or newer; install the pinned wheels", nvcc.display())
    );
    machine.version = Some("gcc");
    assert!(machine.find().unwrap_err().contains("--version printed \"gcc\": expected a release"));
}

#[test]
fn architecture_lists_become_arguments() {
    let parsed = architectures::parse(" 80+PTX; 90,120").unwrap();
    let text: Vec<String> = parsed.iter().map(ToString::to_string).collect();
    assert_eq!(text, ["80+PTX", "90", "120"]);
    assert_eq!(
        architectures::arguments(&parsed),
        [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_80,code=compute_80",
            "-gencode=arch=compute_90,code=sm_90",
            "-gencode=arch=compute_120,code=sm_120",
        ]
    );
    assert_eq!(architectures::parse(architectures::DEFAULT).unwrap().len(), 6);
}

#[test]
fn architecture_lists_that_make_no_sense_are_refused() {
    for (list, item) in [
        ("", ""),
        ("90;", ""),
        ("9.0", "9.0"),
        ("75", "75"),
        ("sm_90", "sm_90"),
        ("+80", "+80"),
        ("90+ptx", "90+ptx"),
    ] {
        let error = architectures::parse(list).unwrap_err();
        assert!(
            error.starts_with(&format!("KVARN_CUDA_ARCHS item {item:?}: expected a number from 80")),
            "{error}"
        );
    }
    let error = architectures::parse("90;90+PTX").unwrap_err();
    assert!(error.contains("\"90+PTX\": expected each number once"), "{error}");
}

#[test]
fn spills_are_read_from_the_log() {
    let log = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4tidyv' for 'sm_90'
ptxas info    : Function properties for _Z4tidyv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
ptxas info    : Compile time = 10.395 ms
ptxas info    : Compiling entry function 'spilt' for 'sm_100'
ptxas info    : Function properties for spilt
    136 bytes stack frame, 20 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 136 bytes cumulative stack size
";
    let kernels = resources::parse(log);
    assert_eq!(kernels.iter().map(resources::Resources::spills).collect::<Vec<_>>(), [false, true]);
    assert_eq!(
        kernels[0].to_string(),
        "_Z4tidyv for sm_90: 168 registers, 0 bytes stack, 0 bytes spill stores, 0 bytes spill loads"
    );
    assert_eq!(
        kernels[1].to_string(),
        "spilt for sm_100: 255 registers, 136 bytes stack, 20 bytes spill stores, 48 bytes spill loads"
    );
}

#[test]
fn images_of_an_earlier_build_are_read_again() {
    let folder = folder("images").canonicalize().unwrap();
    let images = Images {
        toolkit: (13, 0),
        architectures: architectures::parse("80+PTX;90").unwrap(),
        folder: folder.clone(),
        names: vec!["append".into(), "seal".into()],
    };
    images.write_manifest().unwrap();
    let error = table::read(&folder).unwrap_err();
    assert!(error.contains("expected append.fatbin, which manifest.txt lists"), "{error}");
    for name in &images.names {
        touch(&folder.join(format!("{name}.fatbin")));
    }
    assert_eq!(table::read(&folder), Ok(images));

    fs::write(folder.join("manifest.txt"), "toolkit 13\n").unwrap();
    assert!(table::read(&folder).unwrap_err().contains("line \"toolkit 13\" of manifest.txt"));
    fs::write(folder.join("manifest.txt"), "toolkit 13.0\n").unwrap();
    assert!(table::read(&folder).unwrap_err().contains("to list architectures and images"));
    fs::remove_file(folder.join("manifest.txt")).unwrap();
    assert!(table::read(&folder).unwrap_err().contains("expected a folder with manifest.txt, but"));
}

#[test]
fn the_table_names_every_image() {
    let folder = folder("table");
    table::write(&folder, &Images::default()).unwrap();
    let empty = fs::read_to_string(folder.join("images.rs")).unwrap();
    assert!(empty.contains("toolkit: Version::new(0, 0)") && !empty.contains("include_bytes"));
    let images = Images {
        toolkit: (13, 0),
        architectures: architectures::parse("90").unwrap(),
        folder: "/out/images".into(),
        names: vec!["seal".into()],
    };
    table::write(&folder, &images).unwrap();
    let text = fs::read_to_string(folder.join("images.rs")).unwrap();
    assert!(text.contains("Architecture { number: 90, ptx: false }"), "{text}");
    assert!(
        text.contains("name: \"seal\", bytes: &Aligned(*include_bytes!(\"/out/images/seal.fatbin\")).0"),
        "{text}"
    );
}
