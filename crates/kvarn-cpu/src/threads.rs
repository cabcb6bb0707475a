//! The threads of this backend: `KVARN_NUM_THREADS` of them, by default one per core.

use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Number of threads used.
pub fn threads() -> usize {
    std::env::var("KVARN_NUM_THREADS")
        .ok()
        .and_then(|value| value.parse().ok())
        .filter(|&count| (1..=1024).contains(&count))
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get))
}

/// Runs `work` where rayon's parallel calls use this backend's threads.
///
/// The threads belong to one process: after a fork, the child, which inherits no threads, starts its own.
pub(crate) fn install<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);
    let pool = {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        let process = std::process::id();
        match &*pool {
            Some((owner, threads)) if *owner == process => Some(Arc::clone(threads)),
            _ => {
                let built = ThreadPoolBuilder::new()
                    .num_threads(threads())
                    .thread_name(|index| format!("kvarn-{index}"))
                    .build()
                    .ok()
                    .map(Arc::new);
                // A parent's pool is never dropped here: joining threads that do not exist would hang.
                let old = std::mem::replace(&mut *pool, built.clone().map(|threads| (process, threads)));
                std::mem::forget(old);
                built
            }
        }
    };
    match pool {
        // Also where it is one thread: rayon's calls would otherwise use a pool of its own, of all cores.
        Some(pool) => pool.install(work),
        // No threads to be had: the caller's will do.
        None => work(),
    }
}
