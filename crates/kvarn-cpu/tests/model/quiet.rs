//! Panics that are caught here are told once, with what led to them, instead of where they happen.

use std::cell::Cell;
use std::panic;
use std::sync::Once;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Loud again when it is dropped, also by unwinding.
struct Restore;

impl Drop for Restore {
    fn drop(&mut self) {
        QUIET.set(false);
    }
}

/// Runs `work`; a panic of this thread prints nothing.
pub(crate) fn quietly(work: impl FnOnce()) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                loud(info);
            }
        }));
    });
    QUIET.set(true);
    let _restore = Restore;
    work();
}
