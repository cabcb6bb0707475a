//! The devices that images are compiled for.

use std::fmt;

/// Machine code for every generation from 8.0 on, and PTX for devices that have none.
pub(crate) const DEFAULT: &str = "80+PTX;86;89;90;100;120";

/// One target of the compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Architecture {
    /// Ten times the compute capability: 90 for 9.0.
    pub number: u32,
    /// Whether PTX is added, which newer devices compile when they load it.
    pub ptx: bool,
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.number, if self.ptx { "+PTX" } else { "" })
    }
}

/// Reads a list such as "80+PTX;90", separated by semicolons or commas.
pub(crate) fn parse(list: &str) -> Result<Vec<Architecture>, String> {
    let mut parsed: Vec<Architecture> = Vec::new();
    for item in list.split([';', ',']).map(str::trim) {
        let (digits, ptx) = item.strip_suffix("+PTX").map_or((item, false), |digits| (digits, true));
        let number = Some(digits)
            .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|digits| digits.parse().ok());
        let Some(number @ 80..=999) = number else {
            return Err(format!(
                "KVARN_CUDA_ARCHS item {item:?}: expected a number from 80, or one followed by +PTX; \
                 write a list such as \"{DEFAULT}\""
            ));
        };
        if parsed.iter().any(|earlier| earlier.number == number) {
            return Err(format!(
                "KVARN_CUDA_ARCHS item {item:?}: expected each number once; leave the second out"
            ));
        }
        parsed.push(Architecture { number, ptx });
    }
    Ok(parsed)
}

/// The arguments that make nvcc compile for `architectures`.
pub(crate) fn arguments(architectures: &[Architecture]) -> Vec<String> {
    let mut arguments = Vec::new();
    for Architecture { number, ptx } in architectures {
        arguments.push(format!("-gencode=arch=compute_{number},code=sm_{number}"));
        if *ptx {
            arguments.push(format!("-gencode=arch=compute_{number},code=compute_{number}"));
        }
    }
    arguments
}
