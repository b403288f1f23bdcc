"""What can go wrong and be seen without GPUs, torch or Ray: found in a second, before anything is started."""

import json
from pathlib import Path

from dsft_api.batch import BatchError, plan_batch
from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_trainer.checkpoint.store import check_writable, store_of
from dsft_trainer.data.checks import check_rows
from dsft_trainer.data.first_rows import first_rows
from dsft_trainer.data.formats import check_format, eval_source
from dsft_trainer.data.prepare import global_batches, load, load_eval, parts_of
from dsft_trainer.data.sources import check_model_files, fetch, s3_objects
from dsft_trainer.errors import TrainerError
from dsft_trainer.program import check_modules
from dsft_trainer.program_source import use_source

REMOTE = ("hf://", "s3://")


def preflight(job: Job, cache: Path) -> None:
    """Check storage; then the program's module, or batch sizes, model folder and data.

    Raises:
        TrainerError: ConfigInvalid, StorageDenied, ModelDenied or DataInvalid, naming field, value and remedy.
    """
    if job.spec.program is None:
        check_numbers(job)
    check_writable(store_of(job), worked_before=job.attempt > 1)
    if job.spec.program is not None:
        use_source(job)
        check_modules(job.spec.program)
        return
    _check_model(job, cache / "model")
    _check_data(job, cache / "data")


def check_numbers(job: Job) -> None:
    """Batch sizes and precision against the ranks and their device.

    Raises:
        TrainerError: ConfigInvalid.
    """
    spec = job.spec
    training = spec.workload().training
    try:
        plan_batch(training.global_batch_size, job.ranks.count, spec.execution.micro_batch_size)
    except BatchError as error:
        raise TrainerError(
            FailureClass.CONFIG_INVALID, f"spec.training.globalBatchSize: {error.message}", error.remedy
        ) from error
    if training.precision == "fp16" and job.ranks.device == "cpu":
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            "spec.training.precision: fp16 runs on GPUs only, and this run is on CPU",
            "write bf16 or fp32 instead",
        )
    if spec.execution.attention == "flash_attention_2" and job.ranks.device == "cpu":
        raise TrainerError(
            FailureClass.CONFIG_INVALID,
            "spec.execution.attention: flash_attention_2 runs on GPUs only, and this run is on CPU",
            "write sdpa or eager instead",
        )


def _check_model(job: Job, cache: Path) -> None:
    """Local folders are opened; objects are looked for. What is far away is fetched once, by the ranks."""
    model = job.spec.workload().model
    if model.uri.startswith("s3://"):
        _, entries = s3_objects(model.uri, job.spec.storage, "model")
        check_model_files(model.uri, [entry.key for entry in entries])
    if model.uri.startswith(REMOTE):
        return
    folder = fetch(model.uri, storage=job.spec.storage, cache=cache, revision=model.revision, kind="model")
    _check_chat_template(job, folder)


def _check_chat_template(job: Job, folder: Path) -> None:
    work = job.spec.workload()
    chats = [field for field, source in work.data.sources() if source.format == "messages"]
    if not chats or work.data.chat_template is not None:
        return
    config = folder / "tokenizer_config.json"
    in_config = config.is_file() and json.loads(config.read_text()).get("chat_template")
    if not in_config and not (folder / "chat_template.jinja").is_file():
        raise TrainerError(
            FailureClass.DATA_INVALID,
            f"{chats[0]}.format is messages, and the model's tokenizer has no chat template",
            "set spec.data.chatTemplate.fromModel to an instruct model, or spec.data.chatTemplate.template",
        )


def _check_first_rows(job: Job, cache: Path) -> None:
    work = job.spec.workload()
    for field, source in work.data.sources():
        check_format(source, work.model.task, work.data, field)
        rows = first_rows(source, storage=job.spec.storage, cache=cache, field=field)
        if rows is not None:
            check_rows(rows, source, work.model.task, work.model.num_labels, field)
    load_eval(job, cache)


def _check_data(job: Job, cache: Path) -> None:
    """Local files only: what must be downloaded is read once, by the ranks."""
    work = job.spec.workload()
    sources = [*(source for _, source in work.data.sources()), *filter(None, [eval_source(work.data)])]
    if any(source.uri.startswith(REMOTE) for source in sources):
        return
    if work.data.streaming:
        # Reading all rows is what streaming is to spare.
        _check_first_rows(job, cache)
        return
    global_batches(work, [part.table.num_rows for part in parts_of("train", load(job, cache))])
