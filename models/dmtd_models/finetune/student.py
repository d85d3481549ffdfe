"""What fine-tuning trains: the DMTD model over packed documents, with its loss, and the plain model as its teacher.

    frozen layers, from the first on                -> trunk          may come from ``features`` instead
    the rest of E and T                             -> hidden, thought
    late layers over select(gates, hidden, thought) -> rows with loss -> chunked loss against the targets
    plain layers over the trunk                     -> the plain model's distribution at the same rows

The plain model is the starting weights: student and teacher share what the frozen layers give, the trunk. Nothing here steps an
optimiser or reads a file.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmtd_models.checkpoints.tensors import EMBEDDING, FINAL_NORM, layer_prefix, layer_shapes
from dmtd_models.config.model import DmtdSpec, ModelConfig
from dmtd_models.finetune.largest import largest
from dmtd_models.finetune.loss import DenseTargets, SparseTargets, Targets, chunked_loss, sample_columns
from dmtd_models.finetune.options import LossOptions, Trained
from dmtd_models.finetune.packed import Layout, layer_forward, make_layout
from dmtd_models.reference.dmtd import DmtdModel, Read, to_torch
from dmtd_models.reference.layers import DecoderLayer, RMSNorm

_MEASURED_TOP_K = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Loss of one batch, and what is reported of its rows (float32 [r], without gradients)."""

    loss: Tensor  # scalar, the mean over rows
    divergence: Tensor  # from the targets: cross entropy less the targets' entropy
    label_loss: Tensor  # -log p of the token that follows
    agrees: Tensor | None  # whether student and teacher find the same token likeliest, where asked for


class Student(nn.Module):
    """The trainable model and its objective; ``model`` may be wrapped by an adapter library.

    ``base`` is the plain model. It is no part of the module's parameters: it is never trained, saved or sent between processes.
    """

    def __init__(
        self,
        model: nn.Module,
        base: DmtdModel,
        options: LossOptions,
        *,
        frozen_layers: int,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.frozen_layers = frozen_layers
        self.options = options
        self.measured_top_k = min(_MEASURED_TOP_K, base.config.vocab_size)
        self._measured = replace(options, distill=1.0, temperature=1.0, top_k=self.measured_top_k)
        self._gradient_checkpointing = gradient_checkpointing
        self._base = (base,)
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def seed_sampling(self, step: int) -> None:
        """Let what is drawn at random from here on hang on the run's seed and this step alone."""
        self._generator.manual_seed(self._seed * 1_000_003 + step)

    @property
    def base(self) -> DmtdModel:
        """The plain model."""
        return self._base[0]

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        gate_hidden: Tensor,
        gate_thought: Tensor,
        starts: Tensor,
        loss_rows: Tensor,
        labels: Tensor,
        trunk: Tensor | None = None,
        target_ids: Tensor | None = None,
        target_log_probs: Tensor | None = None,
        report_agreement: bool = False,
        comparable: bool = False,
    ) -> StepResult:
        """Loss of one batch (``batches``).

        What the frozen layers give, ``trunk`` [n, hidden], and the plain model's likeliest tokens [r, k] with their logarithms
        may be given; what is not given is computed. With ``comparable`` the divergence is from the plain model's 32 likeliest
        tokens whatever the run learns, for runs of different objectives to be compared by.
        """
        options = self._measured if comparable else self.options
        inner = self.model.base_model.model if hasattr(self.model, "peft_config") else self.model
        spec: DmtdSpec = inner.spec
        late_start = spec.encoding_layers + spec.thinking_layers
        layout = make_layout(inner.config, tuple(starts.tolist()), positions, torch.float32)
        first = max(self.frozen_layers, spec.encoding_layers)
        with torch.no_grad() if self.frozen_layers else nullcontext():
            hidden = inner.model.embed_tokens(input_ids).float()
            hidden = self._run(inner, hidden, 0, spec.encoding_layers, layout)
            if trunk is None:
                trunk = self._run(inner, hidden, spec.encoding_layers, first, layout)
            trunk = trunk.float()
        thought = self._run(inner, trunk, first, late_start, layout)
        plain = self._plain_rows(input_ids, trunk, layout, loss_rows, target_ids, options, report_agreement)
        targets = self._targets(plain, labels, target_ids, target_log_probs, options)
        late = torch.where(gate_hidden.bool()[:, None], hidden, 0.0) + torch.where(
            gate_thought.bool()[:, None], thought, 0.0
        )
        late = self._run(inner, late, late_start, inner.config.num_layers, layout)
        rows = inner.model.norm(late[loss_rows])
        result, likeliest = self._loss(rows, head_weight(inner), targets, labels, options, report_agreement)
        if likeliest is None:
            return result
        if target_ids is None:
            assert plain is not None, "the plain model's rows were computed for the report"
            target_ids, _ = likeliest_tokens(plain, head_weight(self.base), 1, options.rows_on(plain.device))
        return replace(result, agrees=(likeliest == target_ids[:, 0]).float())

    def _run(self, inner: DmtdModel, x: Tensor, first: int, end: int, layout: Layout) -> Tensor:
        for layer in inner.model.layers[first:end]:
            if self._gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer_forward, layer, x, layout, use_reentrant=False)
            else:
                x = layer_forward(layer, x, layout)
        return x

    def _loss(
        self,
        rows: Tensor,
        head: Tensor,
        targets: Targets,
        labels: Tensor,
        options: LossOptions,
        with_likeliest: bool,
    ) -> tuple[StepResult, Tensor | None]:
        columns = None
        sample = options.sampled_on(rows.device)
        if sample and self.training and isinstance(targets, SparseTargets):
            named = torch.cat((targets.ids.flatten(), labels))
            columns = sample_columns(named, head.shape[0], sample, self._generator)
        compute = (
            torch.get_autocast_dtype(rows.device.type) if torch.is_autocast_enabled(rows.device.type) else rows.dtype
        )
        loss, results = chunked_loss(
            rows.to(compute),
            head.to(compute),
            targets,
            labels,
            torch.full((len(rows),), 1 / len(rows), device=rows.device),
            temperature=options.temperature,
            columns=columns,
            chunk_rows=options.rows_on(rows.device),
            with_likeliest=with_likeliest,
        )
        divergence = results.cross_entropy - results.entropy
        result = StepResult(loss=loss, divergence=divergence, label_loss=results.label_loss, agrees=None)
        return result, results.likeliest

    @torch.no_grad()
    def _plain_rows(
        self,
        input_ids: Tensor,
        trunk: Tensor,
        layout: Layout,
        loss_rows: Tensor,
        target_ids: Tensor | None,
        options: LossOptions,
        report_agreement: bool,
    ) -> Tensor | None:
        """The plain model's rows [r, hidden], where targets or the report need them and they are not stored."""
        stored = target_ids is not None and options.top_k > 0
        if stored or (options.distill == 0 and not report_agreement):
            return None
        base = self._base_on(input_ids.device)
        if not self.frozen_layers:
            trunk = base.model.embed_tokens(input_ids).float()
        return plain_rows(base, trunk, self.frozen_layers, layout, loss_rows)

    @torch.no_grad()
    def _targets(
        self,
        plain: Tensor | None,
        labels: Tensor,
        target_ids: Tensor | None,
        target_log_probs: Tensor | None,
        options: LossOptions,
    ) -> Targets:
        if options.distill == 0:
            return SparseTargets(
                ids=labels[:, None], probabilities=torch.ones_like(labels[:, None], dtype=torch.float32)
            )
        head = head_weight(self.base)
        if options.top_k == 0:
            assert plain is not None, "the whole vocabulary's targets are not stored"
            return DenseTargets(hidden=plain, head=head.to(plain.dtype))
        if target_ids is None or target_log_probs is None:
            assert plain is not None, "what is not stored was computed"
            target_ids, target_log_probs = likeliest_tokens(plain, head, options.top_k, options.rows_on(plain.device))
        probabilities = torch.softmax(target_log_probs.float() / options.temperature, dim=-1)
        if options.distill == 1:
            return SparseTargets(ids=target_ids, probabilities=probabilities)
        # A label among the likeliest tokens gets its share there: named twice, it would count twice in the entropy.
        named = target_ids == labels[:, None]
        label_share = 1 - options.distill
        probabilities = probabilities * options.distill + named * label_share
        beside = label_share * ~named.any(dim=-1, keepdim=True)
        return SparseTargets(
            ids=torch.cat((target_ids, labels[:, None]), dim=-1),
            probabilities=torch.cat((probabilities, beside), dim=-1),
        )

    def _base_on(self, device: torch.device) -> DmtdModel:
        if self.base.model.norm.weight.device != device:
            self.base.to(device)
        return self.base


def head_weight(model: DmtdModel) -> Tensor:
    """The output projection [vocab, hidden]; the embedding where they are tied."""
    return model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight


@torch.no_grad()
def plain_rows(base: DmtdModel, trunk: Tensor, layers: int, layout: Layout, rows: Tensor) -> Tensor:
    """The plain model's rows [r, hidden] before its head, in the type of its weights, from what its first ``layers`` gave."""
    x = trunk
    for layer in base.model.layers[layers:]:
        x = layer_forward(layer, x, layout)
    return base.model.norm(x[rows]).to(head_weight(base).dtype)


@torch.no_grad()
def plain_trunk(base: DmtdModel, input_ids: Tensor, layers: int, layout: Layout) -> Tensor:
    """What the plain model's first ``layers`` give, float32 [n, hidden]; the embedding for 0."""
    x = base.model.embed_tokens(input_ids).float()
    for layer in base.model.layers[:layers]:
        x = layer_forward(layer, x, layout)
    return x


@torch.no_grad()
def likeliest_tokens(rows: Tensor, head: Tensor, k: int, chunk_rows: int) -> tuple[Tensor, Tensor]:
    """Ids int64 and log-probabilities float32, [r, k] each, likeliest first; of several likeliest, that of the lowest id."""
    ids, log_probs = [], []
    for part in rows.split(chunk_rows):
        logits = part @ head.t()
        total = logits.logsumexp(-1, keepdim=True).float()
        values, places = largest(logits, k)
        ids.append(_lowest_first(values, places))
        log_probs.append(values - total)
    return torch.cat(ids), torch.cat(log_probs)


def _lowest_first(values: Tensor, ids: Tensor) -> Tensor:
    """Ids of sorted rows, in front the lowest of those with the largest value, as arg-max has it: bfloat16 has many ties."""
    candidates = torch.where(values == values[:, :1], ids, torch.iinfo(ids.dtype).max)
    place = candidates.argmin(-1, keepdim=True)
    front = ids.gather(-1, place)
    ids = ids.scatter(-1, place, ids[:, :1])
    ids[:, :1] = front
    return ids


def trainable_model(
    base: DmtdModel, read: Read, trained: Trained, first_trained: int, *, train_embedding: bool = False
) -> DmtdModel:
    """A model that shares ``base``'s frozen weights and has float32 weights of its own where it is trained: from a layer on.

    For ``lora`` every layer is a module of its own over shared weights, for an adapter library to wrap.
    """
    config, spec = base.config, base.spec
    with torch.device("meta"):
        model = DmtdModel(config, spec)
    model.model.embed_tokens = base.model.embed_tokens
    model.lm_head = base.lm_head
    model.model.norm = base.model.norm
    for index, layer in enumerate(base.model.layers):
        if trained == "lora":
            model.model.layers[index].load_state_dict(layer.state_dict(), assign=True)
            model.model.layers[index].requires_grad_(False)
        elif index >= first_trained:
            model.model.layers[index] = _own_layer(config, read, index)
        else:
            model.model.layers[index] = layer
    if trained != "lora":
        model.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        model.model.norm.load_state_dict({"weight": to_torch(read(FINAL_NORM), torch.float32)})
    if train_embedding:
        model.model.embed_tokens = nn.Embedding.from_pretrained(to_torch(read(EMBEDDING), torch.float32), freeze=False)
        if model.lm_head is not None:
            model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            model.lm_head.weight = nn.Parameter(to_torch(read("lm_head.weight"), torch.float32))
    return model


def _own_layer(config: ModelConfig, read: Read, index: int) -> DecoderLayer:
    with torch.device("meta"):
        layer = DecoderLayer(config)
    prefix = layer_prefix(index)
    state = {name: to_torch(read(prefix + name), torch.float32) for name in layer_shapes(config)}
    layer.load_state_dict(state, strict=True, assign=True)
    return layer
