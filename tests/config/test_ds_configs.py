"""The files in ds_configs: valid as they are, and what their names say."""

from pathlib import Path

import pytest

from dialogpt_ds.config.deepspeed_json import check_deepspeed_config, read_deepspeed_json

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


def test_there_is_a_file_for_every_use() -> None:
    assert [path.stem for path in SHIPPED] == [
        "cpu_bf16",
        "cpu_fp32",
        "zero1_bf16",
        "zero1_bf16_fp32_accumulation",
        "zero1_fp16",
        "zero2_bf16",
        "zero2_fp16",
        "zero2_fp16_offload_optimizer",
        "zero3_fp16",
        "zero3_fp16_offload_nvme",
    ]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_is_valid_and_leaves_batch_and_optimizer_to_the_trainer(path: Path) -> None:
    config = read_deepspeed_json(str(path))
    check_deepspeed_config(config, str(path))
    assert config.keys() <= {"fp16", "bf16", "data_types", "zero_optimization", "aio", "gradient_clipping"}
    assert config["gradient_clipping"] == 1.0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_deepspeed_reads_a_shipped_file_as_its_name_says(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    read = DeepSpeedConfig(read_deepspeed_json(str(path)) | {"train_batch_size": 8})
    stage = 1 if path.stem.startswith("cpu") else int(path.stem[len("zero")])
    assert read.zero_optimization_stage == stage
    assert read.float16_config.enabled == ("fp16" in path.stem)
    assert read.bfloat16_config.enabled == ("bf16" in path.stem)
    assert read.grad_accum_dtype == ("fp32" if "fp32_accumulation" in path.stem else None)
    offloaded = read.zero_config.offload_optimizer
    assert (offloaded is not None) == ("offload" in path.stem)
    assert offloaded is None or offloaded.device == ("nvme" if "nvme" in path.stem else "cpu")
    assert read.gradient_clipping == 1.0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_for_gpus_reduces_gradients_while_others_are_computed(path: Path) -> None:
    """In buckets that begin early: 117M has 124 million weights, of which those of the embedding are ready last."""
    zero = read_deepspeed_json(str(path))["zero_optimization"]
    assert zero["overlap_comm"] == (not path.stem.startswith("cpu"))
    assert zero["overlap_comm"] <= (zero["reduce_bucket_size"] <= 25_000_000)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_files_buckets_take_less_than_a_gigabyte(path: Path) -> None:
    zero = read_deepspeed_json(str(path))["zero_optimization"]
    num_buffers = 2 if zero["overlap_comm"] else 1
    assert num_buffers * zero["reduce_bucket_size"] * 4 < 2**30
