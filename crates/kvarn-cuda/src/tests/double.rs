//! Starts the cases with a double of the driver's library.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{env, fs};

/// Folder of the double, compiled once.
fn double() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("OUT_DIR")).join("driver_double");
        fs::create_dir_all(&folder).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/driver_double/libcuda.rs");
        let output = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
            .args(["--edition=2024", "--crate-type=cdylib", "--crate-name=cuda"])
            .args(["-Clink-arg=-Wl,-soname,libcuda.so.1", "-o"])
            .args([&folder.join("libcuda.so.1"), &source])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        folder
    })
}

/// Kernels of the pools that the cases make, as the double wants them.
fn kernels() -> String {
    let append = size_of::<crate::params::AppendParams>();
    let (expand, attend) =
        (size_of::<crate::params::ExpandParams>(), size_of::<crate::params::AttendParams>());
    format!(
        "kvarn_append_d64_g64={append},kvarn_expand_d64_g64={expand},kvarn_attend_d64_g64_k4v2_n1={attend},kvarn_attend_d64_g64_k4v2_n2={attend}"
    )
}

/// Runs a case of `steps`, whose pools need kernels.
fn run_steps(case: &str, variables: &[(&str, &str)]) {
    run_with_kernels("steps", case, variables);
}

fn run_with_kernels(module: &str, case: &str, variables: &[(&str, &str)]) {
    let kernels = kernels();
    let mut all = vec![("DOUBLE_KERNELS", kernels.as_str())];
    all.extend(variables);
    run_in(double(), module, case, &all);
}

/// Runs a case in a process that finds the library in `folder`.
fn run_in(folder: &Path, module: &str, case: &str, variables: &[(&str, &str)]) {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", &format!("tests::{module}::{case}"), "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", folder)
        .envs(variables.iter().copied())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{case} {variables:?}:\n{text}");
}

fn run(case: &str, variables: &[(&str, &str)]) {
    run_in(double(), "cases", case, variables);
}

/// Expects the text of the error of `Device::open(DEVICE)`.
fn refuses(text: &str, variables: &[(&str, &str)]) {
    let mut all = vec![("EXPECTED", text)];
    all.extend(variables);
    run("open_refuses", &all);
}

#[test]
fn a_library_that_is_none_is_no_driver() {
    let folder = Path::new(env!("OUT_DIR")).join("no_driver");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("libcuda.so.1"), "no library").unwrap();
    run_in(&folder, "cases", "no_driver", &[]);
}

#[test]
fn an_old_driver_is_told_with_both_versions() {
    refuses(
        "an NVIDIA driver for CUDA 12.8: expected one for CUDA 13.0 or newer, which the kernels were built for; update \
         the driver, or use device=\"cpu\"",
        &[("DOUBLE_VERSION", "12080")],
    );
}

#[test]
fn no_device_is_told() {
    let text = "no CUDA device: expected one or more; make them visible to the process (CUDA_VISIBLE_DEVICES), or use \
                device=\"cpu\"";
    refuses(text, &[("DOUBLE_INIT", "100")]);
    refuses(text, &[("DOUBLE_DEVICES", "0")]);
}

#[test]
fn a_device_that_does_not_start_is_told() {
    refuses(
        "cuInit gave CUDA error 803: expected success; restart the machine, so that library and kernel module of the \
         driver are of one version",
        &[("DOUBLE_INIT", "803")],
    );
}

#[test]
fn a_device_without_an_image_is_told_with_its_capability() {
    refuses(
        "cuda:0 of compute capability 7.5: expected one that the kernels were built for (8.0, newer than 8.0 by PTX); \
         build them for it with KVARN_CUDA_ARCHS, or use device=\"cpu\"",
        &[("DOUBLE_CAPABILITY", "75")],
    );
}

#[test]
fn an_index_beyond_the_devices_is_told() {
    refuses(
        "cuda:2 of 2 CUDA devices: expected cuda:0 to cuda:1; choose one of them",
        &[("DOUBLE_DEVICES", "2"), ("DEVICE", "2")],
    );
}

#[test]
fn memory_grows_in_place_and_is_given_back() {
    run("memory_grows", &[]);
}

#[test]
fn memory_that_runs_out_leaves_everything_as_it_was() {
    run("memory_runs_out", &[("DOUBLE_MEMORY", "16777216")]);
}

#[test]
fn a_step_of_mapping_that_fails_is_taken_back() {
    for call in ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"] {
        run("mapping_fails", &[("DOUBLE_FAIL", &format!("{call}:2:1"))]);
    }
}

#[test]
fn without_mapping_memory_is_allocated_at_once() {
    run("memory_without_mapping", &[("DOUBLE_MAPPING", "0"), ("DOUBLE_MEMORY", "16777216")]);
}

#[test]
fn memory_given_back_during_a_capture_is_kept() {
    run("memory_outlives_a_capture", &[]);
}

#[test]
fn borrowed_memory_is_checked_and_its_owner_kept() {
    run("borrowed_memory", &[]);
}

#[test]
fn a_views_memory_is_all_there() {
    run("views_are_provided", &[]);
}

#[test]
fn step_arrays_arrive_and_buffers_are_lent_again() {
    run("step_arrays", &[]);
}

#[test]
fn step_buffers_that_cannot_be_made_leave_nothing() {
    for call in ["cuMemAlloc_v2:1:2", "cuMemHostAlloc:3:2", "cuEventCreate:2:1"] {
        run("step_buffers_fail", &[("DOUBLE_FAIL", call)]);
    }
}

#[test]
fn launches_are_checked_and_the_context_restored() {
    run("launches", &[]);
}

#[test]
fn a_lost_device_is_told_once_with_the_kernel() {
    run("lost_device", &[("DOUBLE_FAIL", "cuLaunchKernelEx:3:700")]);
}

#[test]
fn a_forked_process_is_refused() {
    run("forked", &[]);
}

#[test]
fn partial_results_of_a_long_chunk_take_turns_in_the_same_room() {
    run_steps("long_chunk", &[]);
}

#[test]
fn a_layer_takes_few_driver_calls() {
    run_steps("few_driver_calls", &[]);
}

#[test]
fn arrays_are_sent_again_for_another_stream() {
    run_steps("two_streams", &[]);
}

#[test]
fn a_captured_step_serves_later_ones() {
    run_with_kernels("captures", "captured_step", &[]);
}

#[test]
fn slots_of_forks_are_copied_before_they_are_written_to() {
    run_with_kernels("captures", "forked_step", &[]);
}

#[test]
fn what_cannot_be_captured_is_told_before_a_launch() {
    run_with_kernels("captures", "capture_refused", &[]);
}

#[test]
fn long_chunks_are_left_out() {
    run_with_kernels("captures", "long_chunks_left_out", &[]);
}

#[test]
fn a_cut_into_a_record_is_decoded_into_a_slot() {
    run_with_kernels("truncations", "record_cut", &[]);
}

#[test]
fn other_cuts_launch_nothing() {
    run_with_kernels("truncations", "other_cuts", &[]);
}

#[test]
fn a_cut_takes_the_slot_of_an_offloaded_sequence() {
    run_with_kernels("truncations", "cut_behind_an_offload", &[]);
}

#[test]
fn a_truncation_that_fails_changes_nothing() {
    run_with_kernels("truncations", "failing_cuts", &[]);
}

#[test]
fn a_launch_that_fails_in_the_middle_of_a_truncation_changes_no_sequence() {
    run_with_kernels("truncations", "lost_in_a_cut", &[]);
}

#[test]
fn static_arrays_are_used_by_one_step_at_a_time() {
    run_with_kernels("captures", "static_arrays_refused", &[]);
}

#[test]
fn sequences_leave_and_come_back() {
    run_with_kernels("images", "there_and_back", &[]);
}

#[test]
fn pages_are_given_back_once_they_are_copied() {
    run_with_kernels("images", "late_copy", &[]);
}

#[test]
fn a_copy_that_fails_changes_nothing() {
    for call in ["cuMemHostAlloc", "cuMemcpyDtoHAsync_v2", "cuEventRecord"] {
        run_with_kernels("images", "offload_fails", &[("FAILING", call)]);
    }
    for call in ["cuMemcpyHtoDAsync_v2", "cuEventRecord"] {
        run_with_kernels("images", "restore_fails", &[("FAILING", call)]);
    }
}

#[test]
fn sequences_are_not_copied_during_a_capture() {
    run_with_kernels("images", "copy_captured", &[]);
}

#[test]
fn a_pool_lives_in_borrowed_memory() {
    run_steps("borrowed_pool", &[]);
}

#[test]
fn overwritten_arrays_are_told() {
    run_steps("checked_pool", &[]);
}

#[test]
fn a_step_without_memory_changes_nothing() {
    run_steps("step_without_memory", &[("DOUBLE_MEMORY", "16777216")]);
}

#[test]
fn a_pool_that_cannot_be_made_leaves_nothing() {
    run_steps("pool_without_memory", &[("DOUBLE_FAIL", "cuMemAlloc_v2:1:2")]);
}

#[test]
fn a_device_with_too_little_shared_memory_is_told() {
    run_steps("tile_too_large", &[("DOUBLE_SHARED", "12288")]);
}

#[test]
fn an_attention_without_workspace_can_be_tried_again() {
    run_steps("attend_without_memory", &[("DOUBLE_FAIL", "cuMemAlloc_v2:3:2")]);
}

#[test]
fn a_lost_device_is_told_with_the_pools_kernel() {
    run_steps("lost_in_a_step", &[("DOUBLE_FAIL", "cuLaunchKernelEx:2:700")]);
}
