"""The certificate's own checks: what the pipeline computes on the probe against the model left alone (``checks.probe``)."""

from __future__ import annotations

from dataclasses import replace

import torch

from cedkv.checks.precision import EPSILON, ROUNDINGS
from cedkv.checks.probe import ROWS, WEIGHING, Probe, ProbeCheck, call_alone, faults_of, left_alone, worst
from cedkv.inference.distributions import kl
from cedkv.inference.forward import next_token_logprobs
from cedkv.inference.prefix import encode
from cedkv.kv.attention import AttentionCall, observe_attention
from cedkv.kv.positioning import place
from cedkv.kv.readings import ValueNorm
from cedkv.models.output_projection import TOLERANCE, projections

ROWS_LIMIT = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of attention rows that rounding may make, by dtype, where scores are of usual size."""
MOST_ROUNDING = 0.1
"""Difference of a weight beyond which rounding is no excuse, however large the scores."""


class WeightsWithoutPlace(ProbeCheck):
    """Every weight of the checkpoint has its place in the configuration.

    Why: a configuration that leaves layers out computes another model without an error. Cannot see: a configuration that
    lies about what no weight shows: ``rope_theta``, a rope type, a window.
    """

    name, unit = "weights_without_place", "tensors"

    def limit(self, dtype: str, nats: float) -> float:
        return 0.0

    def measure(self, probe: Probe) -> float:
        return float(len(probe.lm.meta["weights_without_place"]))


class WeightsAreWeights(ProbeCheck):
    """Every weight holds what training leaves behind; the certificate names those that do not.

    Counted are weights that are not finite, matrices of one value, with many rows of zeros, or of whole or very large numbers.

    Why: with weights that were read in part, or whose scale is missing, model and suite compute the same nonsense. Cannot see:
    wrong values of the usual size.
    """

    name, unit = "weights_are_weights", "tensors"

    def limit(self, dtype: str, nats: float) -> float:
        return 0.0

    def measure(self, probe: Probe) -> float:
        return float(len(faults_of(probe.lm)))


class ModelLeftAlone(ProbeCheck):
    """Base, teacher and a prefix in front of a query = the model left alone.

    Largest KL(here || left alone).

    Why: all of Gate A compares this suite with itself; this is the anchor outside of it. Cannot see: what transformers
    itself computes wrongly.
    """

    name = "left_alone"

    def measure(self, probe: Probe) -> float:
        lm, samples, inputs = probe.lm, probe.samples, probe.inputs
        demos = [sample.demo_token_ids for sample in samples]
        short = [tuple(demo[t] for t in k) + q for demo, k, q in zip(demos, probe.kept, inputs.queries, strict=True)]
        with left_alone(lm.model):
            pairs = [
                (inputs.base, call_alone(lm, [s.base_ids for s in samples])),
                (inputs.teacher, call_alone(lm, [s.teacher_ids for s in samples])),
                (inputs.select, call_alone(lm, short)),
            ]
        return worst(float(kl(here, alone).max()) for here, alone in pairs)


class SlotsHaveNoPlace(ProbeCheck):
    """Kept tokens in fewer slots = the whole demo, the rest hidden.

    KL(kept tokens at their positions, in as many slots || the whole demo's slots with the rest masked out). Which slot of
    the cache a token is in must not matter, only the position it was given.

    Why: a model that takes positions from slots would see a short prefix as another text. Cannot see: positions as such:
    both ways are given the same ones.
    """

    name = "slots_have_no_place"

    def measure(self, probe: Probe) -> float:
        lm, samples, inputs = probe.lm, probe.samples, probe.inputs
        lengths = [len(s.demo_token_ids) for s in samples]
        placements = [place(k, n, "absolute", "shrink_to_selected", n) for k, n in zip(probe.kept, lengths, strict=True)]
        few = encode(lm, "gather", samples, placements, inputs.demo, range(len(samples)))
        visible = torch.zeros_like(inputs.demo.visible)
        for row, tokens in enumerate(probe.kept):
            visible[row, list(tokens)] = True
        whole = replace(inputs.demo, visible=visible)
        pair = (next_token_logprobs(lm, inputs.queries, inputs.names, prefix) for prefix in (few, whole))
        return float(kl(*pair).max())


class HiddenPrefixUnseen(ProbeCheck):
    """A prefix hidden from every layer = masked out.

    Why: ``layer_scope.injection`` rests on it. Cannot see: single layers: the prefix is hidden from all of them at once.
    """

    name = "hidden_prefix"

    def measure(self, probe: Probe) -> float:
        lm, inputs = probe.lm, probe.inputs
        masked = replace(inputs.prefix, visible=torch.zeros_like(inputs.prefix.visible))
        unseen = next_token_logprobs(lm, inputs.queries, inputs.names, inputs.prefix, frozenset())
        return float(kl(unseen, next_token_logprobs(lm, inputs.queries, inputs.names, masked)).max())


class _ScoreSizes:
    """Keeps of every layer the largest sum of |q| |k| * scaling that a score is made of."""

    def __init__(self) -> None:
        self.of_layer: dict[int, float] = {}

    def observe(self, call: AttentionCall) -> None:
        key = call.key.abs().float().repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
        largest = float((call.query.abs().float() @ key.transpose(2, 3)).max()) * call.form.scaling
        self.of_layer[call.layer] = max(largest, self.of_layer.get(call.layer, 0.0))


class AttentionRows(ProbeCheck):
    """Attention as it is read = the eager implementation's.

    Largest difference, over layers and heads, of the query's last row, under either pooling, and of the mean of its last two.
    A score's rounding grows with the sum of |q| |k| that it is made of, and a weight follows its score; so differences of a
    layer are divided by how much more than the limit ``ROUNDINGS`` roundings of its largest sum are, if they are more, and
    of ``MOST_ROUNDING`` at most.

    Why: selectors score tokens by these rows. Cannot see: what scores make of the rows: pooling over heads, layers and
    neighbours.
    """

    name, unit = "attention_rows", "absolute"

    def limit(self, dtype: str, nats: float) -> float:
        return ROWS_LIMIT[dtype]

    def measure(self, probe: Probe) -> float:
        differences, sizes = [], _ScoreSizes()
        dtype = probe.lm.meta["torch_dtype"]
        rows = [torch.tensor([list(sample.teacher_ids)], device=probe.lm.device) for sample in probe.samples]
        with observe_attention(sizes):
            for ids in rows:
                probe.lm.model(ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
        rounding = {layer: ROUNDINGS * EPSILON[dtype] * size for layer, size in sizes.of_layer.items()}
        excess = {
            layer: max(1.0, min(by_rounding, MOST_ROUNDING) / ROWS_LIMIT[dtype]) for layer, by_rounding in rounding.items()
        }
        with left_alone(probe.lm.model, WEIGHING):
            for row, (sample, ids) in enumerate(zip(probe.samples, rows, strict=True)):
                maps = probe.lm.model(ids, output_attentions=True).attentions
                for i, layer in enumerate(sorted(probe.layers)):
                    for reading, count in ROWS.items():
                        read = maps[layer][0].float()[:, -count:, : len(sample.demo_token_ids)]
                        expected = read.mean(dim=1) if reading.pooling == "mean" else read.amax(dim=1)
                        difference = float((probe.teacher.maps[reading][row][i] - expected).abs().max())
                        differences.append(difference / excess[layer])
        return worst(differences)


class ValueNorms(ProbeCheck):
    """Norms of values as they are read = those of what the output projection makes of them, head by head.

    Largest difference of ||W_o v|| over the largest norm of the layer. It does not apply where the output projection is not
    known: scores that weigh values are rejected there.

    Why: value-weighted scores rest on them. Cannot see: what is behind the output projection.
    """

    name, unit = "value_norms", "relative"

    def limit(self, dtype: str, nats: float) -> float:
        return TOLERANCE[dtype]

    def measure(self, probe: Probe) -> float | None:
        if ValueNorm() not in probe.teacher.maps:
            return None
        modules, differences = projections(probe.lm.model), []
        with left_alone(probe.lm.model):
            for row, sample in enumerate(probe.samples):
                for i, layer in enumerate(sorted(probe.layers)):
                    value = probe.inputs.demo.values[layer][row, :, : len(sample.demo_token_ids)]
                    read = probe.teacher.maps[ValueNorm()][row][i]
                    written = torch.stack([_written(modules[layer], value, head, len(read)) for head in range(len(read))])
                    differences.append(float((read - written.to(read.device)).abs().max() / written.max()))
        return worst(differences)


def _written(projection: torch.nn.Module, value: torch.Tensor, head: int, heads: int) -> torch.Tensor:
    """Return the norm of what a query head's value makes the projection write, (T,), of ``value`` (H_kv, T, D_h)."""
    alone = value.new_zeros(value.shape[1] + 1, heads, value.shape[2])
    alone[:-1, head] = value[head * len(value) // heads]
    output = projection(alone.flatten(1)).float()
    return (output[:-1] - output[-1]).norm(dim=1)  # the last row is the bias alone
