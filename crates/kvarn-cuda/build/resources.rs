//! What each kernel takes on the device, as `-Xptxas -v` tells.

use std::fmt;

/// Registers and memory of one kernel on one architecture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resources {
    /// Name in the image.
    pub kernel: String,
    /// As in `sm_90`.
    pub architecture: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of a thread's stack frame.
    pub stack: u32,
    /// Bytes of registers written to local memory.
    pub spill_stores: u32,
    /// Bytes of registers read back.
    pub spill_loads: u32,
}

impl Resources {
    /// Whether registers were spilled.
    pub(crate) const fn spills(&self) -> bool {
        self.spill_stores > 0 || self.spill_loads > 0
    }
}

impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} for {}: {} registers, {} bytes stack, {} bytes spill stores, {} bytes spill loads",
            self.kernel, self.architecture, self.registers, self.stack, self.spill_stores, self.spill_loads
        )
    }
}

/// Reads what the compiler printed; device functions that are no kernels count to the kernel above them.
pub(crate) fn parse(log: &str) -> Vec<Resources> {
    let mut kernels: Vec<Resources> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let mut quoted = rest.split('\'');
            let kernel = quoted.next().unwrap_or_default().to_owned();
            let architecture = quoted.nth(1).unwrap_or_default().to_owned();
            kernels.push(Resources { kernel, architecture, ..Resources::default() });
        }
        let Some(last) = kernels.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            let mut before = line.split(" bytes ").map(last_number);
            let mut next = || before.next().flatten().unwrap_or_default();
            last.stack = last.stack.max(next());
            last.spill_stores += next();
            last.spill_loads += next();
        }
        if let Some((_, rest)) = line.split_once("Used ") {
            last.registers =
                rest.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or_default();
        }
    }
    kernels
}

fn last_number(text: &str) -> Option<u32> {
    text.rsplit([' ', ',']).next()?.parse().ok()
}
