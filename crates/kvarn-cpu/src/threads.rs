//! The threads of this backend: `KVARN_NUM_THREADS` of them, by default one per core.

use std::ops::{AddAssign, Range};
use std::sync::atomic::{AtomicUsize, Ordering};
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
pub(crate) fn install<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    match pool() {
        // Also where it is one thread: rayon's calls would otherwise use a pool of its own, of all cores.
        Some(pool) => pool.install(work),
        // No threads to be had: the caller's will do.
        None => work(),
    }
}

/// Blocks that each thread would get if all were equally quick. More cost more than they even out.
const BLOCKS: usize = 2;
/// How often the caller looks whether the others have finished before it sleeps until they have: some ten microseconds, about what
/// being woken takes.
const LOOKS: usize = 1_000;

/// Cuts `0..count` into blocks, which the caller and the threads take one after the other, and returns what `work` makes of
/// them, summed up in no order. What a thread that wakes late has not taken, the caller does.
pub(crate) fn share<R: Default + AddAssign + Send>(
    count: usize,
    work: impl Fn(Range<usize>) -> R + Sync,
) -> R {
    let pool = pool();
    let threads = pool.as_ref().map_or(1, |pool| pool.current_num_threads()).min(count).max(1);
    let block = count.div_ceil(BLOCKS * threads).max(1);
    let (next, finished) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let blocks = || {
        let mut sum = R::default();
        loop {
            let first = next.fetch_add(block, Ordering::Relaxed);
            if first >= count {
                return sum;
            }
            sum += work(first..(first + block).min(count));
        }
    };
    let mut sums: Vec<R> = (1..threads).map(|_| R::default()).collect();
    let mut sum = R::default();
    match pool {
        Some(pool) if threads > 1 => pool.in_place_scope(|scope| {
            let (blocks, finished, spawned) = (&blocks, &finished, sums.len());
            for sum in &mut sums {
                scope.spawn(move |_| {
                    *sum = blocks();
                    finished.fetch_add(1, Ordering::Release);
                });
            }
            sum = blocks();
            for _ in 0..LOOKS {
                if finished.load(Ordering::Acquire) == spawned {
                    break;
                }
                std::hint::spin_loop();
            }
        }),
        _ => sum = blocks(),
    }
    for other in sums {
        sum += other;
    }
    sum
}

/// The threads; none if there are none to be had.
///
/// They belong to one process: after a fork, the child, which inherits no threads, starts its own.
fn pool() -> Option<Arc<ThreadPool>> {
    static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);
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
}
