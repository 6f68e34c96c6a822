"""Settings outside the config that change the numbers of a run: JAX and XLA flags, environment.

Two sets are distinguished. `meaning` collects settings that turn the same config into another
computation: another random generator, other types, another precision. A run never resumes under
different ones silently. `rounding` collects settings that keep the computation and may change the
order of summation: the compiler's effort, the kind and number of devices, the number of processes.
A run may resume under different ones; its results then agree up to rounding and not bit for bit.

Settings that only affect logging, caching, checks or placement are in neither set. A flag that this
module does not know, from another version of JAX, counts as one that may change rounding.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import backends

MEANING = frozenset({
    "jax_allow_f16_reductions",
    "jax_default_dtype_bits",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_explicit_x64_dtypes",
    "jax_high_dynamic_range_gumbel",
    "jax_numpy_dtype_promotion",
    "jax_random_seed_offset",
    "jax_threefry_partitionable",
})  # fmt: skip
"""JAX flags that turn the same config into another computation."""

ROUNDING = frozenset({
    "eager_constant_folding",
    "jax_auto_pcast",
    "jax_backend_target",
    "jax_bcoo_cusparse_lowering",
    "jax_compiler_enable_remat_pass",
    "jax_cpu_collectives_implementation",
    "jax_custom_vjp3",
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_embedded_constants_max_bytes",
    "jax_enable_pgle",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_effort",
    "jax_memory_fitting_level",
    "jax_optimization_level",
    "jax_pallas_use_mosaic_gpu",
    "jax_ragged_dot_use_gpu_pallas_triton_lowering",
    "jax_ragged_dot_use_ragged_dot_instruction",
    "jax_refs_to_pins",
    "jax_remat3",
    "jax_scan3",
    "jax_softmax_custom_jvp",
    "jax_use_direct_linearize",
    "jax_use_emit_pipeline_primitive",
    "jax_use_magma",
    "jax_use_shardy_partitioner",
    "jax_use_simplified_jaxpr_constants",
    "jax_xla_profile_version",
})  # fmt: skip
"""JAX flags that affect how a program is compiled, and so the order of its sums."""

HARMLESS = frozenset({
    "check_vma",
    "jax2tf_associative_scan_reductions",
    "jax2tf_default_native_serialization",
    "jax_array_garbage_collection_guard",
    "jax_captured_constants_report_frames",
    "jax_captured_constants_warn_bytes",
    "jax_check_proxy_envs",
    "jax_check_static_indices",
    "jax_check_tracer_leaks",
    "jax_compilation_cache_check_contents",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_expect_pgle",
    "jax_compilation_cache_include_metadata_in_key",
    "jax_compilation_cache_max_size",
    "jax_compiler_detailed_logging_min_ops",
    "jax_cpu_enable_async_dispatch",
    "jax_cpu_get_global_topology_timeout_minutes",
    "jax_cpu_get_local_topology_timeout_minutes",
    "jax_cross_host_transfer_socket_address",
    "jax_cross_host_transfer_timeout_seconds",
    "jax_cross_host_transfer_transfer_size",
    "jax_cross_host_transport_addresses",
    "jax_cuda_visible_devices",
    "jax_debug_infs",
    "jax_debug_key_reuse",
    "jax_debug_leaked_clients_on_clear_backends",
    "jax_debug_log_modules",
    "jax_debug_nans",
    "jax_default_device",
    "jax_disable_bwd_checks",
    "jax_disable_vmap_shmap_error",
    "jax_disallow_mesh_context_manager",
    "jax_distributed_debug",
    "jax_dump_ir_modes",
    "jax_dump_ir_to",
    "jax_enable_checks",
    "jax_enable_compilation_cache",
    "jax_enable_custom_prng",
    "jax_enable_preemption_service",
    "jax_enable_recoverability",
    "jax_error_checking_behavior_divide",
    "jax_error_checking_behavior_nan",
    "jax_error_checking_behavior_oob",
    "jax_experimental_unsafe_xla_runtime_errors",
    "jax_explain_cache_misses",
    "jax_export_calling_convention_version",
    "jax_export_ignore_forward_compatibility",
    "jax_force_dcn_cross_host_transfers",
    "jax_hlo_source_file_canonicalization_regex",
    "jax_include_debug_info_in_dumps",
    "jax_include_full_tracebacks_in_locations",
    "jax_legacy_prng_key",
    "jax_log_checkpoint_residuals",
    "jax_log_compiles",
    "jax_logging_level",
    "jax_mock_gpu_topology",
    "jax_mosaic_allow_hlo",
    "jax_mutable_array_checks",
    "jax_no_execution",
    "jax_no_tracing",
    "jax_num_cpu_devices",
    "jax_numpy_rank_promotion",
    "jax_oneapi_visible_devices",
    "jax_pallas_enable_debug_checks",
    "jax_pallas_poison_buffers",
    "jax_pallas_verbose_errors",
    "jax_persistent_cache_enable_xla_caches",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_pgle_aggregation_percentile",
    "jax_pgle_profiling_runs",
    "jax_pjrt_client_create_options",
    "jax_platform_name",
    "jax_platforms",
    "jax_pprint_use_color",
    "jax_raise_persistent_cache_errors",
    "jax_remove_custom_partitioning_ptr_from_cache_key",
    "jax_remove_size_one_mesh_axis_from_type",
    "jax_rocm_visible_devices",
    "jax_send_traceback_to_runtime",
    "jax_serialization_version",
    "jax_share_binary_between_hosts",
    "jax_share_binary_between_hosts_timeout_ms",
    "jax_sort_devices_by_process_index",
    "jax_source_url_schema",
    "jax_thread_guard",
    "jax_threefry_gpu_kernel_lowering",
    "jax_traceback_filtering",
    "jax_traceback_in_locations_limit",
    "jax_tracer_error_num_traceback_frames",
    "jax_transfer_guard",
    "jax_transfer_guard_device_to_device",
    "jax_transfer_guard_device_to_host",
    "jax_transfer_guard_host_to_device",
    "jax_xla_backend",
    "mock_num_gpu_processes",
})  # fmt: skip
"""JAX flags for logging, caching, checks and placement, which change no number.

The devices that such a flag selects are recorded by `surroundings`.
"""

# XLA has hundreds of flags, and they change between versions: patterns instead of a list.
_XLA_MEANING = re.compile(
    r"fast_math|fast_min_max|excess_precision|precision|strict_dot|_ftz|denormal|deterministic"
    r"|bf16|f16|fp8|f8|tf32|simplify_all_fp|reduced_precision|autotune_level"
)
_XLA_HARMLESS = re.compile(
    r"^xla_(dump|hlo_profile|force_host_platform_device_count|log|vlog|embed_ir"
    r"|disable_hlo_passes_log|gpu_cuda_data_dir|gpu_force_compilation_parallelism"
    r"|gpu_kernel_cache_file|gpu_per_fusion_autotune_cache_dir"
    r"|cpu_parallel_codegen_split_count|tpu_user_.*limit)"
    r"|_timeout(_seconds|_ms)?$|_debug|_xprof|_profil|_verif"
)
# Variables of NVIDIA's libraries and of TensorFlow's kernels, outside of XLA's own flags.
_ENVIRONMENT = ("NVIDIA_TF32_OVERRIDE", "TF_CUDNN_DETERMINISTIC", "TF_DETERMINISTIC_OPS")


def meaning() -> dict[str, Any]:
    """Settings that would turn the same config into another computation, by name.

    JAX flags have their own names (``jax_enable_x64``), XLA flags two leading dashes
    (``--xla_cpu_enable_fast_math``), and environment variables their own names. No device is
    initialized.
    """
    found = {name: _plain(value) for name, value in jax.config.values.items() if name in MEANING}
    found |= {name: value for name, value in _xla_flags().items() if _XLA_MEANING.search(name)}
    return found | {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}


def rounding() -> dict[str, Any]:
    """Settings that may change the order of sums, by name, including unknown flags.

    No device is initialized.
    """
    values = jax.config.values.items()
    found = {name: _plain(value) for name, value in values if name not in MEANING | HARMLESS}
    return found | {
        name: value for name, value in _xla_flags().items() if not _XLA_MEANING.search(name)
    }


def surroundings() -> dict[str, Any]:
    """The kind and number of devices and the number of processes; this initializes the devices."""
    return backends.description() | {"number of processes": jax.process_count()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two dictionaries of settings, one line each.

    >>> differences({"jax_enable_x64": False}, {"jax_enable_x64": True, "--xla_cpu_ftz": "true"})
    ['--xla_cpu_ftz: not set -> true', 'jax_enable_x64: False -> True']
    """
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return [f"{name}: {_shown(before.get(name))} -> {_shown(now.get(name))}" for name in names]


def unclassified() -> set[str]:
    """Flags of the installed JAX that are in none of the sets above."""
    return set(jax.config.values) - MEANING - ROUNDING - HARMLESS


def _xla_flags() -> dict[str, str]:
    """Flags of XLA and of the TPU library that may change a number, as ``--name`` -> value."""
    found = {}
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        for flag in _words(os.environ.get(variable, "")):
            name, _, value = flag.lstrip("-").partition("=")
            if not _XLA_HARMLESS.search(name):
                # An XLA flag without a value switches a boolean on.
                found[f"--{name}"] = value or "true"
    return found


def _words(flags: str) -> list[str]:
    """Splits the flags of a variable; a value without a leading dash names a file, as for XLA."""
    flags = flags.strip()
    if flags and not flags.startswith("-"):
        path = Path(flags)
        flags = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    try:
        return shlex.split(flags)
    except ValueError:
        # An unclosed quote: XLA then splits the flags at blanks.
        return flags.split()


def _plain(value: Any) -> Any:
    """The value of a flag as JSON data; an enumeration becomes its name."""
    return (
        value
        if value is None or isinstance(value, bool | int | float | str)
        else getattr(value, "name", str(value))
    )


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)
