"""One rank of one attempt, from storage to outcome: restore, prepare data, build the engine, train, export.

The same on every runtime. Everything that is done once per node or once per run is done by the first rank there, with the
others told of its failure (see `collectives.together`).
"""

import json
import logging
import os
import random
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dsft_api.batch import PAD_TO_MULTIPLE_OF, plan_batch
from dsft_api.conditions import FailureClass
from dsft_api.job import Job
from dsft_api.layout import RESULT_FILE, attempt_logs
from dsft_api.progress import TrainerPhase
from dsft_api.status import EvaluationStatus, Output
from dsft_trainer import collectives
from dsft_trainer.bounded import within
from dsft_trainer.checkpoint.best import best_commit
from dsft_trainer.checkpoint.checkpointer import Checkpointer, Identity
from dsft_trainer.checkpoint.commits import Commit
from dsft_trainer.checkpoint.listing import Retention, read_claims
from dsft_trainer.checkpoint.origin import Origin, Pin, open_origin
from dsft_trainer.checkpoint.requests import SaveRequests
from dsft_trainer.checkpoint.restore import Restorer
from dsft_trainer.checkpoint.saver import Cadence, Saver, seconds_between_failures
from dsft_trainer.checkpoint.store import Store, open_store, store_of
from dsft_trainer.data.collate import Collator
from dsft_trainer.data.prepare import Prepared
from dsft_trainer.data.sampler import GlobalBatches
from dsft_trainer.data.sharded import ShardedDataset
from dsft_trainer.data.sources import fetch
from dsft_trainer.data.token_cache import discard
from dsft_trainer.engine import Engine, deepspeed_config, start_engine
from dsft_trainer.errors import TrainerError, failure_of
from dsft_trainer.evaluate import Evaluator
from dsft_trainer.export import export
from dsft_trainer.interconnect import check_interconnect
from dsft_trainer.logs import keep_last_lines, log_name, output_files
from dsft_trainer.loop import Schedule, Trainer
from dsft_trainer.losses import batch_loss
from dsft_trainer.metrics import MetricsLog
from dsft_trainer.model import check_length, load_model, load_tokenizer
from dsft_trainer.model_checks import check_model
from dsft_trainer.progress import Pace, Reporter, SilentReporter
from dsft_trainer.run_data import prepare_data
from dsft_trainer.runtime import Outcome, Runtime
from dsft_trainer.samples import SampleWriter
from dsft_trainer.scratch import node_scratch
from dsft_trainer.stopping import Stopper
from dsft_trainer.trackers import trackers_of
from dsft_trainer.versions import versions
from dsft_trainer.watchdog import ARCHIVE_SECONDS, MARGIN_SECONDS, Watchdog, archived_stacks, hang

log = logging.getLogger(__name__)


def run_rank(job: Job, runtime: Runtime, device: torch.device) -> Outcome:
    """Do this rank's part of an attempt. The process group is up, and torch's threads are pinned.

    Raises:
        TrainerError: on every rank, whatever rank the cause was on; also told to the launcher.
    """
    name = log_name(runtime.place.rank, runtime.opening)

    def hung(seconds: float) -> None:
        stacks = f"{attempt_logs(job.attempt)}/stacks-{name}.txt"
        archived = within(ARCHIVE_SECONDS, lambda: archived_stacks(store_of(job).impatient(), stacks, seconds))
        runtime.fail((archived or hang(seconds)).report(runtime.place.rank))

    try:
        stall_seconds = job.spec.deadlines.stall_seconds
        with Watchdog(stall_seconds, hung, collectives.outlast) as watchdog, node_scratch(job) as scratch:
            return _Attempt(job, runtime, device, scratch, watchdog).run()
    except Exception as error:
        failure = failure_of(error)
        log.exception("rank %s failed", runtime.place.rank)
        # One that only felt another one go has nothing to tell.
        if failure.failure_class is not FailureClass.WORKER_LOST:
            failure.evidence = keep_last_lines(job, name, output_files())
        runtime.fail(failure.report(runtime.place.rank))
        raise failure from error


class _Attempt:
    """The steps of one rank's life, in order."""

    def __init__(self, job: Job, runtime: Runtime, device: torch.device, scratch: Path, watchdog: Watchdog) -> None:
        self.job = job
        self.spec = job.spec
        self.work = job.spec.workload()
        self.runtime = runtime
        self.place = runtime.place
        self.device = device
        self.scratch = scratch
        self.watchdog = watchdog
        self.beat = watchdog.beat
        self.store: Store = store_of(job)
        self.reporter: Reporter | SilentReporter = (
            Reporter(runtime.opening, runtime.publish, self.store, self._superseded)
            if self.place.is_first
            else SilentReporter()
        )

    def _superseded(self, error: TrainerError) -> None:
        """End at once: there is nothing to save, and the loop may hang or be far from its next commit."""
        log.error("%s", error)
        self.runtime.fail(error.report(self.place.rank))
        os._exit(error.exit_code)

    def run(self) -> Outcome:
        try:
            return self._run()
        finally:
            self.reporter.close()

    def _run(self) -> Outcome:
        check_interconnect(self.job, self.device, self.reporter)
        checkpointer = self._begin()
        self.reporter.update(phase=TrainerPhase.LOADING, message="loading model and data")
        model, storage, cache = self.work.model, self.spec.storage, self.scratch / "model"
        with self.watchdog.patient():
            folder = collectives.once_per_node(
                self.place,
                lambda: fetch(model.uri, storage=storage, cache=cache, revision=model.revision, kind="model"),
            )
        self.beat()
        tokenizer = load_tokenizer(folder, trust_remote_code=self.work.model.trust_remote_code)
        data = prepare_data(self.job, self.runtime, self.store, self.scratch, folder, tokenizer, self.watchdog)
        self.beat()
        batches = data.batches(self.work)
        schedule = self._schedule(batches, has_eval=data.eval is not None)
        checkpointer.restorer.check_end(schedule.total_steps)
        engine = self._engine(
            folder, tokenizer, data, schedule.total_steps, universal=checkpointer.restorer.must_convert
        )
        self.beat()
        checkpointer.load(engine)
        if checkpointer.restorer.resized:
            # The generators of other ranks are not ours to go on with: draw anew, and not what the first step drew.
            seed_everything(_seed(self.work.training.seed, checkpointer.restorer.first_step, self.place.rank))
        self.beat()
        metrics = self._metrics_log(str(checkpointer.claim))
        if metrics is not None:
            checkpointer.before_commit = metrics.upload
        trainer = self._trainer(engine, data, batches, tokenizer, checkpointer, schedule, metrics)
        outcome: Outcome | None = None
        try:
            outcome = trainer.run(checkpointer.restorer.first_step)
        finally:
            # Also when it failed: a save that is on its way may still count, and the last lines are those that explain.
            checkpointer.close(self.spec.checkpoint.drain_seconds)
            if isinstance(data.train, ShardedDataset):
                data.train.close()
            if metrics is not None:
                metrics.close(outcome)
        if outcome is Outcome.INTERRUPTED:
            self.reporter.update(phase=TrainerPhase.INTERRUPTED, message="stopped on request; state is committed")
        else:
            message = trainer.stopper.message(checkpointer.commits[-1].step, schedule.total_steps)
            self._finish(engine, tokenizer, checkpointer, message)
        # The node's scratch folder goes when the first of its ranks leaves: leave together.
        collectives.barrier()
        return outcome

    def _begin(self) -> Checkpointer:
        """Claim a group start, and fetch the checkpoint it goes on from."""
        evaluation, policy = self.spec.evaluation, self.spec.checkpoint
        checkpointer = Checkpointer(
            self.store,
            self.place,
            self.scratch,
            Identity(
                spec_hash=self.job.spec_hash,
                zero_stage=self.spec.deepspeed.stage,
                precision=self.work.training.precision,
                versions=versions(),
            ),
            Retention(policy.keep_last, policy.keep_best, evaluation.metric, evaluation.larger_is_better),
            Restorer(
                self.store,
                self.place,
                self.scratch,
                on_world_size_change=policy.on_world_size_change,
                origin=self._origin() if self.spec.start_from else None,
            ),
        )
        base = checkpointer.begin(self.job.attempt)
        self.reporter.claimed(checkpointer.claim)
        log.info("%s starts from %s", checkpointer.claim, base.name if base else "the beginning")
        self.reporter.update(
            group=checkpointer.claim.group,
            from_step=checkpointer.restorer.first_step,
            checkpoints=checkpointer.references(self.job.storage_prefix),
        )
        if base is not None and checkpointer.restorer.must_convert:
            self.beat()
            change = f"of {base.world_size} ranks, for {self.place.world_size}"
            self.reporter.update(phase=TrainerPhase.LOADING, message=f"converting checkpoint {base.name} {change}")
            checkpointer.convert()
            self.beat()
        return checkpointer

    def _origin(self) -> Callable[[], Origin]:
        """Opens the checkpoint of another run that the first attempt chose."""
        start, known, storage = self.spec.start_from, self.job.resolved, self.spec.storage
        pin = Pin(known.start_uri or "", known.start_digest or "") if known else Pin("", "")

        def open_(uri: str) -> Store:
            return open_store(uri, endpoint_url=storage.endpoint_url, region=storage.region)

        return lambda: open_origin(pin, weights_only=start is not None and start.mode == "weights", open_=open_)

    def _schedule(self, batches: GlobalBatches, *, has_eval: bool) -> Schedule:
        per_epoch = batches.steps_per_epoch
        total = self.work.training.max_steps or max(1, round((self.work.training.epochs or 0) * per_epoch))
        return Schedule(
            total_steps=total,
            steps_per_epoch=per_epoch,
            evaluate_every=(self.spec.evaluation.every_steps or per_epoch) if has_eval else None,
        )

    def _saver(self, checkpointer: Checkpointer, steps_per_epoch: int) -> Saver:
        policy = self.spec.checkpoint
        if policy.interval == "auto":
            claims = read_claims(self.store) if self.place.is_first else []
            cadence = Cadence(seconds_between_failures=seconds_between_failures(claims, datetime.now(UTC)))
        elif policy.every_minutes is not None:
            cadence = Cadence(every_minutes=policy.every_minutes)
        else:
            cadence = Cadence(every_steps=policy.every_steps or steps_per_epoch)
        return Saver(checkpointer, cadence, max_failures=policy.max_failures)

    def _engine(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, data: Prepared, total_steps: int, *, universal: bool
    ) -> Engine:
        plan = plan_batch(
            self.work.training.global_batch_size, self.place.world_size, self.spec.execution.micro_batch_size
        )
        config = deepspeed_config(self.spec, plan, universal=universal)
        # New weights (a classification head) must come out the same on every rank ...
        seed_everything(self.work.training.seed)
        model = load_model(
            self.work.model,
            folder,
            config,
            precision=self.work.training.precision,
            attention=self.spec.execution.attention,
            activation_checkpointing=self.spec.execution.activation_checkpointing,
            loss_kernel=self.spec.execution.loss_kernel,
            pad_token_id=tokenizer.pad_token_id,
            lora=self.work.training.lora,
        )
        check_length(model, data.positions)
        engine = start_engine(
            model, config, self.work.training.optimizer, self.work.training.schedule, total_steps, self.device
        )
        check_model(self.spec, engine, model)
        # ... and dropout different.
        seed_everything(self.work.training.seed * 100_003 + self.place.rank + 1)
        return engine

    def _metrics_log(self, claim: str) -> MetricsLog | None:
        if not self.place.is_first:
            return None
        trackers = trackers_of(self.job, self.scratch, self.store)
        return MetricsLog(
            self.store, claim, self.scratch, tensorboard=self.spec.tracking.tensorboard, trackers=trackers
        )

    def _trainer(
        self,
        engine: Engine,
        data: Prepared,
        batches: GlobalBatches,
        tokenizer: PreTrainedTokenizerBase,
        checkpointer: Checkpointer,
        schedule: Schedule,
        metrics: MetricsLog | None,
    ) -> Trainer:
        collator = Collator(
            tokenizer.pad_token_id or 0,
            self.work.model.task,
            self.work.data.max_length,
            PAD_TO_MULTIPLE_OF[self.job.ranks.device],
        )
        loss = batch_loss(engine, self.work.model.task, self.spec.execution.loss_kernel)
        evaluator = None
        if data.eval is not None:
            evaluator = Evaluator(
                data.eval,
                collator,
                self.place,
                task=self.work.model.task,
                loss=loss,
                num_labels=self.work.model.num_labels or 2,
                batch_size=self.spec.execution.eval_batch_size,
                device=self.device,
                beat=self.beat,
            )
        sample_writer = None
        if data.eval is not None and (samples := self.spec.evaluation.samples) is not None:
            batch_size = self.spec.execution.eval_batch_size
            sample_writer = SampleWriter(data.eval, tokenizer, samples, batch_size=batch_size, beat=self.beat)
        self.watchdog.pace = pace = Pace()
        self.watchdog.outlast = partial(collectives.outlast, group=engine.process_group)
        self.watchdog.outlast(self.spec.deadlines.stall_seconds + MARGIN_SECONDS)
        return Trainer(
            engine=engine,
            dataset=data.train,
            want=data.train.want if isinstance(data.train, ShardedDataset) else None,
            batches=batches,
            collator=collator,
            evaluator=evaluator,
            sample_writer=sample_writer,
            saver=self._saver(checkpointer, schedule.steps_per_epoch),
            stopper=Stopper(self.spec.evaluation, checkpointer.restorer.patience),
            schedule=schedule,
            place=self.place,
            reporter=self.reporter,
            metrics=metrics,
            loss=loss,
            micro_batch_size=self.spec.execution.micro_batch_size,
            drain_requested=lambda: self.runtime.wishes().drain,
            requests=SaveRequests(lambda: self.runtime.wishes().save, self.runtime.opening.checkpoint_request),
            beat=self.beat,
            storage_prefix=self.job.storage_prefix,
            pace=pace,
        )

    def _finish(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, checkpointer: Checkpointer, message: str
    ) -> None:
        """Export, then write RESULT.json: the run is over when it exists."""
        last = checkpointer.commits[-1]
        exported = best_commit(checkpointer) if self.spec.evaluation.early_stopping else last
        # Whoever claims the run from here on starts from this last commit, and exports the same.
        collectives.on_first(self.place.is_first, checkpointer.check_claim)
        exports, weights = self.spec.export.format != "none", None
        if exports:
            self.reporter.update(phase=TrainerPhase.EXPORTING, message="exporting the model")
            if exported == last:
                weights = engine.full_state_dict(trained_only=self.work.training.lora is not None)
        with self.watchdog.patient():
            if isinstance(self.reporter, Reporter):
                output = None
                if exports:
                    output = export(self.job, engine.model, tokenizer, self.store, self.scratch, exported, weights)
                checkpointer.check_claim()
                self._record_end(self.reporter, last, output, message)
            collectives.barrier()

    def _record_end(self, reporter: Reporter, last: Commit, output: Output | None, message: str) -> None:
        evaluation = reporter.progress.evaluation
        if last.metrics and (evaluation is None or evaluation.step != last.step):
            evaluation = EvaluationStatus(step=last.step, metrics=last.metrics)
        reporter.update(
            phase=TrainerPhase.SUCCEEDED,
            output=output,
            evaluation=evaluation,
            message=message,
        )
        result = reporter.progress.to_wire() | {"finishedAt": datetime.now(UTC).isoformat()}
        self.store.put_bytes(RESULT_FILE, json.dumps(result, indent=1).encode())
        discard(self.store)


def _seed(*parts: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_everything(seed: int) -> None:
    """Seed all generators that training draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
