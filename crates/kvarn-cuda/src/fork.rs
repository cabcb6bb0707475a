//! Forked processes: the driver's state does not survive a fork, and using it there crashes or hangs.

use std::ffi::c_int;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Error;

static FORKED: AtomicBool = AtomicBool::new(false);

unsafe extern "C" {
    /// POSIX: `child` runs in the child of every later fork.
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> c_int;
}

extern "C" fn mark() {
    FORKED.store(true, Ordering::Relaxed);
}

/// Watches for forks from now on; called once the driver is in use.
pub(crate) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: `mark` stays loaded as long as the process, and only writes an atomic, which a child may do.
        let refused = unsafe { pthread_atfork(None, None, Some(mark)) };
        // It fails only without memory for a list entry; then forks go unnoticed here and the driver itself reports
        // that it is not initialised.
        debug_assert_eq!(refused, 0);
    });
}

/// Whether this process was forked from one that used the driver.
pub(crate) fn forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

/// An error in such a process.
pub(crate) fn check() -> Result<(), Error> {
    if forked() { Err(Error::Forked) } else { Ok(()) }
}
