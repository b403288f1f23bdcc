"""What is trained: model, data, optimisation. These fields are the run's identity, frozen once it began."""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dsft_api.base import ApiModel, FreeForm, ObjectName, Rule, Uri

Task = Literal["causal-lm", "sequence-classification"]
DataFormat = Literal["classification", "pair", "text", "prompt_completion", "messages"]
Metric = Literal["loss", "perplexity", "accuracy", "f1"]
ALL_LINEAR = "all-linear"
TARGETS_PATTERN = rf"^({ALL_LINEAR}|[A-Za-z0-9_.]+(, ?[A-Za-z0-9_.]+)*)$"


class ModelSpec(ApiModel):
    """The pretrained model that the run starts from, in Hugging Face layout (config.json, safetensors, tokenizer)."""

    uri: Uri = Field(
        description="Where the model is: hf://ORG/NAME, s3://BUCKET/FOLDER, file:///FOLDER or python://PACKAGE/FOLDER."
    )
    revision: str | None = Field(
        default=None, max_length=128, description="Branch, tag or commit of an hf:// model. Default: main."
    )
    task: Task = Field(description="What the model is trained to do; decides the head and the metrics.")
    num_labels: int | None = Field(
        default=None, ge=2, le=10000, description="Number of classes; sequence-classification only. Default: 2."
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run the Python code that the model's repository carries. On a cluster only if the admin allows the model.",
    )

    rules = (
        Rule(
            "!has(self.numLabels) || self.task == 'sequence-classification'",
            "numLabels belongs to task sequence-classification; remove it",
            ".numLabels",
        ),
    )

    @model_validator(mode="after")
    def _labels_need_classification(self) -> Self:
        if self.num_labels is not None and self.task != "sequence-classification":
            raise ValueError("numLabels belongs to task sequence-classification; remove it")
        return self


class Columns(ApiModel):
    """Names of the columns in the data set, where they differ from the format's own names."""

    text: str | None = Field(
        default=None, max_length=128, description="Text, or the first text of a pair. Default: text."
    )
    text_pair: str | None = Field(default=None, max_length=128, description="Second text of a pair. Default: textPair.")
    label: str | None = Field(default=None, max_length=128, description="Class, an integer from 0. Default: label.")
    prompt: str | None = Field(default=None, max_length=128, description="Prompt, not trained on. Default: prompt.")
    completion: str | None = Field(
        default=None, max_length=128, description="Completion, trained on. Default: completion."
    )
    messages: str | None = Field(
        default=None, max_length=128, description="List of {role, content} messages. Default: messages."
    )


class DatasetSource(ApiModel):
    """One data set: a file or folder of JSONL, Parquet or CSV, a saved Hugging Face data set, or one on the Hub."""

    uri: Uri = Field(description="hf://ORG/NAME, s3://BUCKET/KEY, file:///PATH or python://PACKAGE/PATH.")
    revision: str | None = Field(
        default=None, max_length=128, description="Branch, tag or commit of an hf:// data set."
    )
    subset: str | None = Field(
        default=None, max_length=128, description="Configuration of an hf:// data set, such as mrpc."
    )
    split: str | None = Field(
        default=None, max_length=128, description="Split of an hf:// or saved data set. Default: train."
    )
    format: DataFormat = Field(description="What a row holds; decides the columns that are read.")
    columns: Columns = Field(default_factory=Columns, description="Column names that differ from the format's.")


class EvalSource(ApiModel):
    """The held-out data. What is left out is taken from data.train, so {split: validation} is often enough."""

    uri: Uri | None = Field(default=None, description="As data.train.uri. Default: the same.")
    revision: str | None = Field(default=None, max_length=128, description="As data.train.revision.")
    subset: str | None = Field(default=None, max_length=128, description="As data.train.subset.")
    split: str | None = Field(default=None, max_length=128, description="As data.train.split.")
    format: DataFormat | None = Field(default=None, description="As data.train.format.")
    columns: Columns | None = Field(default=None, description="As data.train.columns.")


class WeightedDataset(DatasetSource):
    """One member of a mixture."""

    weight: float = Field(
        default=1.0,
        gt=0,
        le=1_000_000,
        description="Share of the samples of an epoch that this data set gives, relative to the weights of the others.",
    )


class ConfigMapKey(ApiModel):
    """One key of a ConfigMap in the resource's namespace."""

    name: ObjectName = Field(description="Name of the ConfigMap.")
    key: str = Field(max_length=253, description="Key in it.")


class ChatTemplate(ApiModel):
    """Where the Jinja chat template comes from, if the model's own tokenizer has none. Exactly one field."""

    from_model: str | None = Field(
        default=None,
        max_length=256,
        description="URI of, or Hub name of, a model whose tokenizer carries the template.",
    )
    template: str | None = Field(default=None, max_length=16384, description="The Jinja template itself.")
    config_map_ref: ConfigMapKey | None = Field(
        default=None, description="A key of a ConfigMap that holds the template."
    )

    rules = (
        Rule(
            "[has(self.fromModel), has(self.template), has(self.configMapRef)].filter(x, x).size() == 1",
            "set exactly one of fromModel, template and configMapRef",
        ),
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if [self.from_model, self.template, self.config_map_ref].count(None) != 2:
            raise ValueError("set exactly one of fromModel, template and configMapRef")
        return self

    @property
    def model_uri(self) -> str | None:
        """Where `from_model` is."""
        return f"hf://{self.from_model}" if self.from_model and "://" not in self.from_model else self.from_model


class DataSpec(ApiModel):
    """The data of the run, and how it becomes tokens."""

    train: DatasetSource | None = Field(default=None, description="The training data.")
    mixture: Annotated[tuple[WeightedDataset, ...], Field(min_length=2, max_length=32)] | None = Field(
        default=None,
        description="Several weighted training data sets, instead of train. An epoch has as many samples as all of them "
        "together; each gives its share, and goes through its own rows once before any of them comes again.",
    )
    eval: EvalSource | None = Field(default=None, description="The evaluation data. Default: none, so no evaluation.")
    eval_fraction: float | None = Field(
        default=None,
        gt=0,
        le=0.5,
        description="Share of the training rows to hold out, chosen by the seed, instead of eval.",
    )
    chat_template: ChatTemplate | None = Field(default=None, description="Chat template for format messages.")
    loss_on: Literal["assistant", "completion", "all"] | None = Field(
        default=None,
        description="Tokens that are trained on. Default: assistant for messages, completion for prompt_completion, "
        "all for text.",
    )
    max_length: int = Field(
        default=512, ge=8, le=1_048_576, description="Longest sequence in tokens; longer rows are cut."
    )
    packing: bool = Field(
        default=False,
        description="Put several short rows into one sequence of up to maxLength tokens, kept apart by positions and mask. "
        "causal-lm only. A sample, as globalBatchSize and epochs count them, is then such a sequence.",
    )
    group_by_length: bool = Field(
        default=False,
        description="Draw rows of like length into one global batch, so that less of it is padding. Each row still comes once "
        "per epoch, and which batch comes when is still random. Not with packing, which leaves nothing to pad.",
    )
    streaming: bool = Field(
        default=False,
        description="For data that is larger than a node's disk or memory: files are tokenised one at a time into shards in the "
        "run's folder, and a node holds only some of these. Rows are shuffled within windows of shards. JSON lines, CSV or "
        "Parquet at s3:// or file://, and evaluation data of its own.",
    )
    loader: Literal["torch", "ray-data"] = Field(
        default="torch",
        description="Who tokenises: one process per node (torch), or Ray Data in parallel (ray-data). Same order.",
    )

    rules = (
        Rule("has(self.train) != has(self.mixture)", "set exactly one of train and mixture"),
        Rule("!(has(self.eval) && has(self.evalFraction))", "set only one of eval and evalFraction"),
        Rule("!(self.packing && self.groupByLength)", "set only one of packing and groupByLength"),
    )

    @model_validator(mode="after")
    def _one_source_each(self) -> Self:
        if (self.train is None) == (self.mixture is None):
            raise ValueError("set exactly one of train and mixture")
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError("set only one of eval and evalFraction")
        if self.packing and self.group_by_length:
            raise ValueError("set only one of packing and groupByLength")
        return self

    def sources(self) -> Iterator[tuple[str, DatasetSource]]:
        """Every training data set with its field, in manifest order."""
        if self.train is not None:
            yield "spec.data.train", self.train
        for index, member in enumerate(self.mixture or ()):
            yield f"spec.data.mixture[{index}]", member


class OptimizerSpec(ApiModel):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101). Biases and norm weights are not decayed."""

    name: Literal["adamw"] = Field(default="adamw", description="The optimizer.")
    learning_rate: float = Field(gt=0, le=1, description="Peak learning rate.")
    betas: Annotated[tuple[float, ...], Field(min_length=2, max_length=2)] = Field(
        default=(0.9, 0.999), description="Decay of the first and second moment."
    )
    epsilon: float = Field(default=1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="Decoupled weight decay.")


class ScheduleSpec(ApiModel):
    """Learning rate over steps: warm-up to the peak, then the named decay to minLrRatio times the peak."""

    type: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="Shape after the warm-up.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of the warm-up.")
    warmup_type: Literal["linear", "log"] = Field(
        default="linear",
        description="How the learning rate rises in them: in a line, or with the logarithm of the step, fast at first, as "
        "DeepSpeed's WarmupLR has it by default.",
    )
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="Final learning rate as a share of the peak.")


class LoraSpec(ApiModel):
    """Low-rank adaptation (arXiv 2106.09685): the pretrained weights are frozen, and small updates of them are trained."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank of the update.")
    alpha: int = Field(default=32, ge=1, description="Scale of the update, divided by the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str = Field(
        default=ALL_LINEAR,
        pattern=TARGETS_PATTERN,
        max_length=1024,
        description="Modules that get an adapter: names of linear layers, separated by commas (q_proj,v_proj), or "
        f"{ALL_LINEAR} for all but the output layer. The head of a classifier is trained in full.",
    )
    use_dora: bool = Field(
        default=False,
        description="Train the magnitude of each weight apart from its direction (DoRA, arXiv 2402.09353).",
    )

    @property
    def name(self) -> str:
        """As the papers call it."""
        return "DoRA" if self.use_dora else "LoRA"


class TrainingSpec(ApiModel):
    """The optimisation: what decides the loss curve, whatever the hardware."""

    epochs: float | None = Field(default=None, gt=0, le=1000, description="Passes over the training data; or maxSteps.")
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps in all; or epochs.")
    global_batch_size: int = Field(
        ge=1,
        le=1_048_576,
        description="Samples per optimizer step over all ranks: rows, or sequences where data.packing is true. "
        "Stays the same on other hardware.",
    )
    optimizer: OptimizerSpec = Field(description="The optimizer.")
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec, description="The learning-rate schedule.")
    gradient_clipping: float = Field(default=1.0, ge=0, description="Largest gradient norm; 0 switches clipping off.")
    precision: Literal["bf16", "fp16", "fp32"] = Field(default="bf16", description="Compute dtype. fp16 on GPUs only.")
    lora: LoraSpec | None = Field(default=None, description="Train low-rank adapters instead of all weights.")
    seed: int = Field(default=42, ge=0, le=2**31 - 1, description="Seed of data order, dropout and new weights.")

    rules = (Rule("has(self.epochs) != has(self.maxSteps)", "set exactly one of epochs and maxSteps"),)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("set exactly one of epochs and maxSteps")
        return self


class EarlyStopping(ApiModel):
    """Stop when the metric no longer gets better. Counted over restarts."""

    patience: int = Field(default=3, ge=1, description="Evaluations without an improvement before the run stops.")
    min_delta: float = Field(default=0.0, ge=0, description="Smallest change that counts as an improvement.")


class SamplesSpec(ApiModel):
    """What the model writes after the prompts of a few evaluation rows: for people to read."""

    count: int = Field(default=4, ge=1, le=64, description="Evaluation rows, evenly spread over all of them.")
    max_new_tokens: int = Field(
        default=64,
        ge=1,
        le=512,
        description="Longest text, in tokens. A stop waits for the texts that are being written.",
    )


class EvaluationSpec(ApiModel):
    """When the held-out data is evaluated, and which metric decides the best checkpoint."""

    every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between evaluations. Default: once per epoch. The end is always evaluated.",
    )
    metric: Metric = Field(default="loss", description="The metric that decides the best checkpoint.")
    mode: Literal["min", "max"] | None = Field(
        default=None, description="Whether smaller or larger is better. Default: by the metric."
    )
    early_stopping: EarlyStopping | None = Field(
        default=None,
        description="Stop early. The exported model is then that of the best checkpoint by the metric, also if the run "
        "trains to its end; needs checkpoint.keepBest.",
    )
    samples: SamplesSpec | None = Field(
        default=None,
        description="Let the model go on from the prompts of some rows at each evaluation, always with the likeliest token; "
        "causal-lm only. The texts are kept in storage and in TensorBoard.",
    )

    @property
    def larger_is_better(self) -> bool:
        """Whether the larger of two values of the metric is the better one."""
        mode = self.mode or ("max" if self.metric in ("accuracy", "f1") else "min")
        return mode == "max"


FUNCTION = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


class ProgramSource(ApiModel):
    """Where the user's code comes from, when it is not in the image: an archive in storage, or a Git commit."""

    git: str | None = Field(
        default=None,
        pattern=r"^https?://[^/@$\s]+/[^?#$\s]+$",
        max_length=1024,
        description="URL of a Git repository, whose root is put first on Python's path. For a private one give GIT_TOKEN from a "
        "Secret in spec.env.",
    )
    rev: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{40}$", max_length=40, description="Commit in it: its whole id."
    )
    archive: str | None = Field(
        default=None,
        pattern=r"^(s3|file)://.+\.(tar\.gz|tgz|zip)$",
        max_length=1024,
        description="A .tar.gz, .tgz or .zip of files and folders, at s3:// or file://. Its root is put first on Python's path.",
    )
    digest: str | None = Field(
        default=None,
        pattern=r"^sha256:[0-9a-f]{64}$",
        max_length=71,
        description="sha256:... of the archive, as sha256sum tells it.",
    )

    rules = (
        Rule("has(self.git) != has(self.archive)", "set exactly one of archive and git"),
        Rule("has(self.archive) == has(self.digest)", "archive needs digest, and digest archive"),
        Rule("has(self.git) == has(self.rev)", "git needs rev, and rev git"),
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.git is None) == (self.archive is None):
            raise ValueError("set exactly one of archive and git")
        if (self.archive is None) != (self.digest is None):
            raise ValueError("archive needs digest, and digest archive")
        if (self.git is None) != (self.rev is None):
            raise ValueError("git needs rev, and rev git")
        return self


class ProgramSpec(ApiModel):
    """Your own DeepSpeed code, instead of model, data and training."""

    entrypoint: str = Field(pattern=FUNCTION, max_length=256, description="MODULE:FUNCTION, called on each rank.")
    config: FreeForm = Field(
        default_factory=dict[str, object], description="Passed to the function as its only argument."
    )
    datasets: str | None = Field(
        default=None,
        pattern=FUNCTION,
        max_length=256,
        description="MODULE:FUNCTION, called once with the same config before the ranks start: a dict of Ray Data's datasets, of "
        "which each rank gets its part by ray.train.get_dataset_shard(NAME).",
    )
    source: ProgramSource | None = Field(default=None, description="Where the code comes from. Default: the image.")


class StartFrom(ApiModel):
    """Start from a checkpoint of another run of the same namespace and `storage.uri`, chosen by the first attempt."""

    run: ObjectName = Field(description="Name of the run.")
    checkpoint: str = Field(
        default="latest", max_length=128, description="latest, best (by evaluation.metric), or a checkpoint's name."
    )
    mode: Literal["resume", "weights"] = Field(
        default="resume",
        description="resume: go on with weights, optimizer, schedule and step. weights: begin at step 0 with its weights.",
    )
