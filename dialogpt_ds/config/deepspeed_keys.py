"""The keys that DeepSpeed 0.19 reads from its JSON, as a table that needs neither deepspeed nor torch.

Importing deepspeed takes seconds; a spelling mistake should be reported in milliseconds. A test compares this table
with the installed DeepSpeed, so a release that adds or removes keys is noticed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the value of a key must be."""

    must_be: str
    """The end of the sentence "it must be ..."."""
    holds: Callable[[Any], bool]
    """Whether a value read from JSON follows the rule."""
    accepts_null: bool = False
    """Whether `null` is allowed as well."""

    def or_null(self) -> "Rule":
        """Return the same rule with `null` allowed."""
        return dataclasses.replace(self, must_be=f"{self.must_be}, or null", accepts_null=True)


Node: TypeAlias = "Rule | dict[str, Node]"
"""A rule for a value, or a block: a table of the keys that are valid inside it."""


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    # bool is a subclass of int, and Python's JSON reader accepts NaN and Infinity.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return (isinstance(value, int) or math.isfinite(value)) and low <= value <= high


def _is_whole(value: Any, low: float = -math.inf) -> bool:
    # DeepSpeed takes 5e8 for a whole number, and many files in use write their bucket sizes like that.
    return _is_number(value, low) and value == int(value)


def one_of(*names: str, any_case: bool = False) -> Rule:
    """Return the rule that a value is one of these strings."""
    return Rule(
        "one of " + ", ".join(f'"{name}"' for name in names),
        lambda value: isinstance(value, str) and (value.lower() if any_case else value) in names,
    )


BOOL = Rule("true or false", lambda value: isinstance(value, bool))
INT = Rule("a whole number", _is_whole)
COUNT = Rule("a whole number, 0 or more", lambda value: _is_whole(value, 0))
SIZE = Rule("a whole number, 1 or more", lambda value: _is_whole(value, 1))
# Batch sizes go into arithmetic and file names here, so 8.0 is not taken for 8.
BATCH = Rule("a whole number, 1 or more", lambda value: isinstance(value, int) and _is_whole(value, 1))
NUMBER = Rule("a number", _is_number)
NON_NEGATIVE = Rule("a number, 0 or more", lambda value: _is_number(value, 0))
FRACTION = Rule("a number from 0 to 1", lambda value: _is_number(value, 0, 1))
BETAS = Rule(
    "a list of two numbers, each at least 0 and less than 1",
    lambda value: (
        isinstance(value, list) and len(value) == 2 and all(_is_number(beta, 0) and beta < 1 for beta in value)
    ),
)
STAGE = Rule("0, 1, 2 or 3", lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3)
TEXT = Rule("a string", lambda value: isinstance(value, str))
LIST = Rule("a list", lambda value: isinstance(value, list))
NAMES = Rule(
    "a list of strings", lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)
)
FREE = Rule("an object", lambda value: isinstance(value, dict))
ANYTHING = Rule("any value", lambda value: True, accepts_null=True)
HALF_OR_FULL = one_of("fp16", "bf16", "fp32", any_case=True)


def _all(rule: Node, names: str) -> dict[str, Node]:
    return dict.fromkeys(names.split(), rule)


_OFFLOAD: dict[str, Node] = {
    "device": one_of("none", "cpu", "nvme"),
    "nvme_path": TEXT.or_null(),
    "buffer_count": COUNT,
    "pin_memory": BOOL,
}

_ZERO: dict[str, Node] = {
    "stage": STAGE,
    "reduce_bucket_size": SIZE,
    **_all(COUNT, "allgather_bucket_size sub_group_size zero_hpz_partition_size"),
    **_all(
        BOOL,
        "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions compute_grad_norm "
        "load_from_fp32_weights elastic_checkpoint ignore_unused_parameters legacy_stage1 round_robin_gradients "
        "parameter_alignment zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients "
        "memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings "
        "enable_sanity_checks save_muon_momentum_buffer_in_memory stage3_gather_fp16_weights_on_model_save",
    ),
    # The last three are the deprecated spelling of the two offload blocks.
    **_all(BOOL.or_null(), "overlap_comm cpu_offload cpu_offload_param cpu_offload_use_pin_memory"),
    # DeepSpeed reads each of these with and without "stage3_".
    **{
        prefix + name: rule
        for prefix in ("", "stage3_")
        for name, rule in {
            **_all(COUNT, "prefetch_bucket_size param_persistence_threshold model_persistence_threshold"),
            **_all(COUNT, "max_live_parameters max_reuse_distance"),
            "module_granularity_threshold": INT,
            **_all(BOOL, "gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params allgather_sequential"),
        }.items()
    },
    "offload_param": {**_OFFLOAD, **_all(COUNT, "buffer_size max_in_cpu")},
    "offload_optimizer": {
        **_OFFLOAD,
        **_all(BOOL, "pipeline_read pipeline_write fast_init super_offload"),
        **_all(FRACTION, "ratio cpuadam_cores_perc"),
    },
    "zenflow": {
        **_all(FRACTION, "topk_ratio auto_ratio pt_reserved_cores_perc"),
        "select_strategy": one_of("auto", "step", "epoch"),
        **_all(SIZE, "select_interval update_interval"),
        **_all(BOOL, "overlap_step offload"),
        "full_warm_up_rounds": COUNT,
        "steps_per_epoch": INT.or_null(),
    },
    "leaf_module": _all(ANYTHING, "classes names name_suffixes"),
}

_BF16 = _all(
    BOOL, "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
)

_TENSOR_PARALLEL_GROUP: dict[str, Node] = {**_all(INT, "tp_size tp_grain_size"), **_all(ANYTHING, "mpu tp_group")}

ADAM_PARAMS: dict[str, Node] = {
    **_all(NON_NEGATIVE, "lr eps weight_decay"),
    "betas": BETAS,
    **_all(BOOL, "torch_adam adam_w_mode fp32_optimizer_states amsgrad"),
    **_all(BOOL, "bias_correction set_grad_none"),
    **_all(BOOL.or_null(), "foreach fused"),
    **_all(BOOL, "maximize capturable differentiable"),
}
"""`optimizer.params` of Adam and AdamW; which of them go together depends on the implementation, see below."""

TORCH_ADAM_ONLY = frozenset({"foreach", "fused", "maximize", "capturable", "differentiable"})
"""Arguments of torch.optim.AdamW that DeepSpeed's own Adam does not have."""
OWN_ADAM_ONLY = frozenset({"bias_correction", "set_grad_none"})
"""Arguments of DeepSpeed's own Adam that torch.optim.AdamW does not have."""

TABLE: dict[str, Node] = {
    **_all(BATCH, "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"),
    **_all(SIZE.or_null(), "steps_per_print vocabulary_size"),
    **_all(SIZE, "sequence_parallel_size data_parallel_size"),
    **_all(
        BOOL,
        "managed_gradient_accumulation dump_state disable_python_gc disable_allgather prescale_gradients "
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer wall_clock_breakdown memory_breakdown "
        "use_data_before_expert_parallelism dataloader_drop_last",
    ),
    **_all(HALF_OR_FULL.or_null(), "communication_data_type seq_parallel_communication_data_type"),
    "gradient_predivide_factor": NUMBER,
    "gradient_allreduce_op": one_of("mean", "sum"),
    "gradient_clipping": NON_NEGATIVE,
    "log_level": TEXT.or_null(),
    "optimizer": {"type": TEXT, "params": ADAM_PARAMS, "legacy_fusion": BOOL},
    "zero_optimization": _ZERO,
    "fp16": {
        **_all(BOOL, "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads"),
        "loss_scale": NON_NEGATIVE,
        "initial_scale_power": COUNT,
        **_all(SIZE, "loss_scale_window hysteresis min_loss_scale"),
    },
    "bf16": _BF16,
    "bfloat16": _BF16,
    "torch_autocast": {"enabled": BOOL, "dtype": TEXT, "lower_precision_safe_modules": NAMES},
    "data_types": {
        **_all(TEXT.or_null(), "grad_accum_dtype param_dtype buffer_dtype"),
        "keep_in_fp32_modules": NAMES,
    },
    "activation_checkpointing": {
        **_all(BOOL, "partition_activations contiguous_memory_optimization cpu_checkpointing"),
        **_all(BOOL, "synchronize_checkpoint_boundary profile"),
        "number_checkpoints": SIZE.or_null(),
    },
    "checkpoint": {
        "tag_validation": one_of("ignore", "warn", "fail", any_case=True),
        **_all(BOOL, "load_universal use_node_local_storage checkpoint_serialization"),
        "parallel_write": {"pipeline_stage": BOOL},
        "writer": {
            "type": one_of("mock", "python", "fast", any_case=True),
            "data_parallel": one_of("replica", "socket", "machine", any_case=True).or_null(),
            **_all(BOOL, "io_buffer_double show_statistics decoupled"),
            **_all(SIZE, "io_buffer_size io_multiplier"),
        },
    },
    "aio": {
        **_all(SIZE, "block_size queue_depth intra_op_parallelism"),
        **_all(BOOL, "single_submit overlap_events use_gds"),
    },
    "comms_logger": {**_all(BOOL, "enabled prof_all verbose debug"), "prof_ops": LIST},
    "flops_profiler": {
        **_all(BOOL, "enabled detailed"),
        "recompute_fwd_factor": NUMBER,
        **_all(INT, "profile_step module_depth top_modules"),
        "output_file": TEXT.or_null(),
    },
    "timers": {"throughput": _all(BOOL, "enabled synchronized")},
    "tensorboard": {"enabled": BOOL, **_all(TEXT, "output_path job_name")},
    "csv_monitor": {"enabled": BOOL, **_all(TEXT, "output_path job_name")},
    "wandb": {"enabled": BOOL, **_all(TEXT.or_null(), "group team"), "project": TEXT},
    "comet": {
        "enabled": BOOL,
        "samples_log_interval": INT,
        **_all(TEXT.or_null(), "project workspace api_key experiment_name experiment_key mode"),
        "online": BOOL.or_null(),
    },
    "compile": {
        **_all(
            BOOL,
            "deepcompile autoep_non_moe free_activation offload_activation offload_activation_pin_memory "
            "offload_opt_states double_buffer symmetric_memory debug_log offload_parameters sync_before_reduce "
            "sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors "
            "keep_all_input_tensors",
        ),
        "free_activation_threshold": INT,
        "passes": NAMES.or_null(),
    },
    "hybrid_engine": {
        **_all(BOOL, "enabled release_inference_cache pin_parameters enable_cuda_graph"),
        "max_out_tokens": SIZE,
        **_all(INT, "inference_tp_size tp_gather_partition_size"),
    },
    "tensor_parallel": {
        **_all(BOOL, "tp_overlap_comm keep_module_on_host kernel_inject replace_with_kernel_inject"),
        "autotp_size": INT,
        "vocab_parallel_lm_head": BOOL.or_null(),
        "vocab_parallel_ce_backend": one_of("torch", "liger"),
        "preset_model": TEXT.or_null(),
        **_all(ANYTHING, "dtype injection_policy_tuple partition_config"),
        **_all(_TENSOR_PARALLEL_GROUP, "tp tensor_parallel"),
    },
    "expert_parallel": _all(
        ANYTHING,
        "enabled autoep_size expert_tensor_parallel_size validate_folding_routing async_split_plan preset_model "
        "moe_layer_pattern expert_pattern router_pattern use_grouped_mm disable_triton_grouped_mm route_norm "
        "route_scale score_apply combine_impl row_weighting_impl gate_up_impl comm_backend comm_num_sm comm_qp_margin "
        "comm_max_tokens_per_rank num_expert_groups num_limited_groups score_func top_k load_balance_coeff "
        "routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr has_shared_experts "
        "shared_experts_pattern shared_experts_gate_pattern expert_activation",
    ),
    "weight_quantization": {
        "enabled": BOOL,
        **_all(INT, "num_bits q_groups"),
        "q_type": TEXT,
        **_all(FREE, "quantized_initialization post_init_quant"),
    },
    "data_efficiency": {"enabled": BOOL, "seed": INT, **_all(FREE, "data_sampling data_routing")},
    # No fixed set of keys: DeepSpeed copies these blocks or hands them on.
    **_all(FREE, "pipeline autotuning"),
    "datastates_ckpt": ANYTHING,
}
"""Every key that DeepSpeed reads and this trainer can run with; deprecated spellings and aliases included."""

NULL_BLOCKS = frozenset(
    {
        "aio",
        "checkpoint.writer",
        *(f"zero_optimization.{name}" for name in ("offload_param", "offload_optimizer", "zenflow", "leaf_module")),
    }
)
"""Blocks that DeepSpeed lets be null."""

AUTO_ALLOWED = frozenset(
    {
        "data_types.keep_in_fp32_modules",
        "pipeline.stages",
        *(f"zero_optimization.zenflow.{name}" for name in ("select_strategy", "select_interval", "update_interval")),
        *(f"expert_parallel.{name}" for name in ("score_apply", "combine_impl", "row_weighting_impl")),
        *(f"expert_parallel.{name}" for name in ("score_func", "top_k", "routed_scaling_factor")),
    }
)
"""Keys for which DeepSpeed itself gives "auto" a meaning."""
