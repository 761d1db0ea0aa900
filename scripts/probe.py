"""What a checkpoint's loss does not say: whether it looks ahead, knows what it does not know, and finds the right word.

    python -m scripts.probe outputs/venom                                     # the newest checkpoint of a run
    python -m scripts.probe outputs/studies/recipes_160m/*/checkpoint/step-* --out docs/studies/recipes_160m

Each checkpoint gets an entry, by its step, in `OUT/RUN/probe.json`, a table is printed and `OUT/reliability.png` drawn.
All of it is measured on held-out documents, in the ways in which the model's FFNs can be run:

    dense     as inference runs them; the only one for a model whose recipe is dense
    pattern   as a sparse phase runs them: V tokens of the batch share a pattern, sorted by the router
    past      causal: V tokens that follow each other in a sequence share a pattern, chosen from the V before them; the
              first V choose each their own
    token     causal: every token chooses its own pattern, V = 1

**Leak.** In a sparse phase a token's output depends on tokens after it, since they take part in choosing the pattern of
its block, and, by sorting, which block it is in. So the second half of every sequence is replaced by that of another
and the first half is looked at again. Nothing in it may change; what does is the leak:

    leak_kl         KL(before || after) of the next-token distributions, nats a token
    leak_logprob    mean absolute change of the next token's log-probability
    leak_argmax     share of the positions whose likeliest token changed
    leak_gain       loss of the true first half after the replacement minus before: what knowing the future was worth

once with the futures of all sequences of the micro-batch replaced, and once (own_*) with a sequence's own future alone,
which is what could teach a model to look ahead. `past` and `token` are the price of choosing from permitted tokens
only: their loss against that of `pattern` and `dense`.

**Calibration.** The expected calibration error over the likeliest tokens (Guo et al., ICML 2017), in BINS bins of equal
width of confidence c: sum over bins of share * |accuracy - mean c|. The picture shows accuracy against confidence.

**Cloze.** Which word ends a line? The true one against three others of the same document, by the sum of their tokens'
log-probabilities after the text before. The items depend on the held-out documents alone, not on the tokenizer; a
quarter is chance. Asked of dense inference.

**Health.** The sparsity health of recipes/metrics.py, by layer.
"""

import argparse
import gc
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as `python scripts/probe.py`: look imports up from the repository, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from configs.errors import ConfigError, exit_with
from configs.schema import JobConfig
from configs.titan import TORCH_DTYPE_MAP, device_module, device_type
from kernels import Pattern, Venom, hidden_activations
from models.feed_forward import FeedForward
from recipes.checkpoint import find_checkpoint, load_model
from recipes.data import load_corpus, validation_sequences
from recipes.schedule import resolve_phases
from recipes.sparsity import Sparsity
from recipes.tokenizer import build_tokenizer, prepare_tokenizer, token_bytes
from recipes.trainer import commit
from scripts.plot import DPI, GREY, PALETTE, STYLE
from scripts.report import probes_table

BINS = 15
CHOICES = 4
CONTEXT = 512  # tokens before a cloze item's word, at most
OWN = 8  # sequences of a micro-batch whose own future is replaced alone, a forward pass each
LINE_END = re.compile(r"(?m)( ?)(?<!\w)([^\W\d]\w{2,})[^\w\n]*$")
WORD = re.compile(r"[^\W\d]\w{2,}")


# Causal choices of a pattern.


def causal_mask(h: Tensor, pattern: Pattern, way: str) -> Tensor:
    """Which entries of h a pattern keeps when it is chosen from permitted tokens only.

    Args:
        h: `[B, S, f]`, non-negative: sequences of tokens.
        pattern: of V tokens.
        way: "past" or "token", as the module docstring has them.

    Returns:
        bool `[B, S, f]`.
    """
    own = replace(pattern, v=1)
    if way == "token":
        return own.mask(h.flatten(0, 1)).view_as(h)
    batch, length, width = h.shape
    blocks = -(-length // pattern.v)
    padded = F.pad(h, (0, 0, 0, blocks * pattern.v - length)).view(batch, blocks, pattern.v, width)
    sums = padded.float().sum(2)
    before = F.pad(sums, (0, 0, 1, -1))
    # All four columns of a Venom block, whatever n; an entry that was zero in the past is chosen too if its turn comes.
    choose = replace(own, n=4) if isinstance(own, Venom) else own
    chosen = choose.mask(before.clamp_min(torch.finfo(torch.float32).tiny).flatten(0, 1)).view(batch, blocks, 1, width)
    chosen[:, 0] = True
    cut = torch.where(chosen, padded, 0).flatten(1, 2)[:, :length]
    return own.mask(cut.flatten(0, 1)).view_as(h)


def _causal_forward(feed_forward: FeedForward, way: str, x: Tensor) -> Tensor:
    """The FFN of `x [B, S, d]` with its pattern chosen causally; counts what it keeps as the FFN itself does."""
    sparsity = feed_forward.sparsity
    w1_scale = feed_forward.w1_scale if 1 in sparsity.weight_products else None
    h = hidden_activations(x.flatten(0, 1), feed_forward.w1.weight, w1_scale).view(*x.shape[:2], -1)
    assert sparsity.pattern is not None
    cut = torch.where(causal_mask(h, sparsity.pattern, way), h, 0)
    entries = torch.tensor(float(h.numel()), device=h.device)
    feed_forward.activity += torch.stack(
        [entries, (h != 0).sum().float(), (h.float() ** 2).sum(), (cut.float() ** 2).sum()]
    )
    return feed_forward.w2(cut)


@contextmanager
def run_as(sparsity: Sparsity, way: str) -> Iterator[None]:
    """Run the model's FFNs in one of its ways."""
    sparsity.phase = "dense" if way == "dense" else "sparse"
    for feed_forward in sparsity.feed_forwards:
        feed_forward.sparse = way == "pattern"
        if way in ("past", "token"):
            feed_forward.forward = partial(_causal_forward, feed_forward, way)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for feed_forward in sparsity.feed_forwards:
            feed_forward.sparse = False
            feed_forward.__dict__.pop("forward", None)


def ways(sparsity: Sparsity) -> list[str]:
    """The ways in which a run's FFNs can be run."""
    if all(span.mode == "dense" for span in sparsity.spans) or not sparsity.feed_forwards:
        return ["dense"]
    pattern = sparsity.feed_forwards[0].sparsity.pattern
    # A pattern of one token is causal as it is.
    return ["dense", "pattern"] + (["past", "token"] if pattern is not None and pattern.v > 1 else [])


# Measurements.


class Probe:
    """Measures one checkpoint. All methods leave the model as it was."""

    def __init__(self, checkpoint: Path, sequences: int | None = None) -> None:
        self.step = int(find_checkpoint(checkpoint).name.removeprefix("step-"))
        self.model, self.config = load_model(checkpoint)
        config = self.config
        config.model.hf_assets_path = prepare_tokenizer(config)
        self.tokenizer = build_tokenizer(config)
        self.bytes = token_bytes(config.model.hf_assets_path)
        if len(self.bytes) != (vocabulary := self.model.model_args.vocab_size):
            raise ConfigError(
                f"{checkpoint} is of a model with a vocabulary of {vocabulary}, but the tokenizer in "
                f"{config.model.hf_assets_path} has {len(self.bytes)} tokens: give the corpus that the run had, or "
                "restore its tokenizer"
            )
        spans = resolve_phases(config.schedule.phases, config.training.steps)
        self.sparsity = Sparsity(config, self.model.feed_forwards(), [], spans)
        config.validation.sequences = sequences or config.validation.sequences
        rows = validation_sequences(self.tokenizer, config)
        # Whole micro-batches: in a smaller one, other tokens would share a pattern than in training.
        size = min(config.training.local_batch_size, len(rows))
        self.batches = rows[: len(rows) // size * size].split(size)
        dtype = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
        self.amp = torch.autocast(device_type, dtype, enabled=dtype != torch.float32)

    def measure(self, items: int) -> dict[str, Any]:
        """Everything, as probe.json has it."""
        result: dict[str, Any] = {"sequences": sum(map(len, self.batches)), "bins": BINS, "ways": {}}
        with torch.no_grad(), self.amp:
            for way in ways(self.sparsity):
                with run_as(self.sparsity, way):
                    result["ways"][way] = self.score(way) | self.leak()
            result["cloze"] = self.cloze(items)
        return result

    def logits(self, tokens: Tensor) -> Tensor:
        """`[B, S]` int64 to `[B, S, vocabulary]`, on the device."""
        return self.model(tokens.to(device_type))

    def score(self, way: str) -> dict[str, Any]:
        """Loss, bits per byte, accuracy, calibration and health on the held-out sequences."""
        self.sparsity.reset_health()
        loss = torch.zeros((), dtype=torch.float64, device=device_type)
        bins = torch.zeros(3, BINS, dtype=torch.float64, device=device_type)  # tokens, sum of confidence, right ones
        size = 0
        for batch in self.batches:
            inputs, labels = batch[:, :-1], batch[:, 1:]
            size += int(self.bytes[labels].sum())
            for row, label in zip(self.logits(inputs), labels.to(device_type), strict=True):
                logprobs = row.float().log_softmax(-1)
                loss -= logprobs.gather(-1, label[:, None]).double().sum()
                confidence, choice = logprobs.exp().max(-1)
                index = (confidence * BINS).long().clamp_max(BINS - 1)
                for total, value in zip(bins, (torch.ones_like(confidence), confidence, choice == label), strict=True):
                    total.index_add_(0, index, value.double())
        tokens = bins[0].sum()
        health = self.sparsity.health()
        if way in ("past", "token"):  # without a router
            health = {key: value for key, value in health.items() if not key.endswith("router_balance")}
        return {
            "loss": (loss / tokens).item(),
            "bits_per_byte": loss.item() / (math.log(2) * size),
            "accuracy": (bins[2].sum() / tokens).item(),
            "ece": ((bins[1] - bins[2]).abs().sum() / tokens).item(),
            "reliability": {
                "tokens": bins[0].long().tolist(),
                "confidence": (bins[1] / bins[0].clamp_min(1)).tolist(),
                "accuracy": (bins[2] / bins[0].clamp_min(1)).tolist(),
            },
            "health": health,
        }

    def leak(self) -> dict[str, float]:
        """How the first half of the sequences changes when what follows it is replaced."""
        sequences = torch.cat(self.batches)
        half = (sequences.shape[1] - 1) // 2
        if len(sequences) < 2 or half < 1:
            raise ConfigError(
                f"validation.sequences = {len(sequences)} of training.seq_len = {sequences.shape[1] - 1} tokens leave "
                "no other future to put in: probe a run with two sequences or more"
            )
        others = torch.cat([sequences[:, :half], sequences.roll(1, 0)[:, half:]], 1).split(len(self.batches[0]))
        every, own = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
        for batch, other in zip(self.batches, others, strict=True):
            before = self.logits(batch[:, :-1])[:, :half]
            after = self.logits(other[:, :-1])[:, :half]
            labels = batch[:, 1 : half + 1].to(before.device)
            for row in range(len(batch)):
                every += _changes(before[row], after[row], labels[row])
            for row in range(0, len(batch), -(-len(batch) // OWN)):
                alone = batch.clone()
                alone[row] = other[row]
                own += _changes(before[row], self.logits(alone[:, :-1])[row, :half], labels[row])
        names = ("kl", "logprob", "argmax", "gain")
        return {
            f"{prefix}_{name}": value
            for prefix, sums in (("leak", every), ("own", own))
            for name, value in zip(names, (sums[:4] / sums[4]).tolist(), strict=True)
        }

    def cloze(self, items: int) -> dict[str, Any]:
        """Share of the items whose true word scores best, and its standard error; None where there is no item."""
        limit = min(CONTEXT, self.config.training.seq_len)
        right = count = 0
        for context, words in cloze_items(self.config, items):
            # As many characters as the tokens that fit could have, and more.
            before = self.tokenizer.encode(context[-16 * limit :], add_bos=True, add_eos=False)
            options = [self.tokenizer.encode(word, add_bos=False, add_eos=False) for word in words]
            longest = max(map(len, options))
            before = before[-(limit + 1 - longest) :]
            # A causal model does not see what the shorter options are filled up with.
            rows = torch.tensor([before + option + [0] * (longest - len(option)) for option in options])
            logprobs = self.logits(rows[:, :-1])[:, len(before) - 1 :].float().log_softmax(-1).cpu()
            picked = logprobs.gather(-1, rows[:, len(before) :, None])[..., 0]
            scores = [float(picked[place, : len(option)].sum()) for place, option in enumerate(options)]
            right += scores[0] > max(scores[1:])
            count += 1
        if not count:
            return {"items": 0, "choices": CHOICES, "accuracy": None, "standard_error": None}
        accuracy = right / count
        error = math.sqrt(accuracy * (1 - accuracy) / count)
        return {"items": count, "choices": CHOICES, "accuracy": accuracy, "standard_error": error}


def _changes(before: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """Sums over the positions of KL, |change of log p(label)|, changes of arg max, growth of the loss; their number.

    Args:
        before, after: `[T, vocabulary]`, logits.
        labels: `[T]` int64.

    Returns:
        float64 `[5]`, on the CPU.
    """
    old, new = before.float().log_softmax(-1), after.float().log_softmax(-1)
    kl = (old.exp() * (old - new)).sum()
    change = (old - new).gather(-1, labels[:, None]).double()
    flips = (old.argmax(-1) != new.argmax(-1)).sum()
    sums = [kl, change.abs().sum(), flips, change.sum()]
    return torch.tensor([*map(float, sums), float(len(labels))], dtype=torch.float64)


def cloze_items(config: JobConfig, count: int) -> Iterator[tuple[str, list[str]]]:
    """Items of the held-out documents: the text before a line's last word, and that word followed by three others.

    At most two a document, of lines past its first 200 characters; a blank before the word belongs to the word.
    """
    made = 0
    for document in load_corpus(config).held_out() or []:
        text = document["text"]
        chance = random.Random(f"{text[:1000]} {len(text)}")  # the same items whatever was asked before
        ends = [match for match in LINE_END.finditer(text, 200)]
        words = sorted(set(WORD.findall(text)))
        for match in chance.sample(ends, min(2, len(ends))):
            blank, word = match.groups()
            others = [other for other in words if other != word]
            if len(others) < CHOICES - 1 or made == count:
                continue
            made += 1
            yield text[: match.start()], [blank + option for option in [word, *chance.sample(others, CHOICES - 1)]]
        if made == count:
            return


def draw(results: dict[str, dict[str, Any]], out: Path) -> Path:
    """Accuracy against confidence of dense inference, and how many tokens have which confidence."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.5, 7.0), dpi=DPI, layout="constrained")
        main, below = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        main.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="perfectly calibrated")
        for place, (name, result) in enumerate(results.items()):
            colour, way = PALETTE[place % len(PALETTE)], result["ways"]["dense"]
            tokens, confidence, accuracy = (way["reliability"][key] for key in ("tokens", "confidence", "accuracy"))
            full = [place for place, number in enumerate(tokens) if number]
            x, y = ([values[place] for place in full] for values in (confidence, accuracy))
            style = "-" if place < len(PALETTE) else "--"
            label = f"{name}: ECE {100 * way['ece']:.2f}%"
            main.plot(x, y, style, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=label)
            below.plot(x, [tokens[place] / sum(tokens) for place in full], style, color=colour, linewidth=1.4)
        main.set_title("Calibration of next-token predictions, dense inference")
        main.set_ylabel("accuracy of the likeliest token")
        main.legend(loc="upper left")
        below.set_ylabel("share of tokens")
        below.set_xlabel(f"confidence, {BINS} bins")
        below.set_ylim(bottom=0)
        figure.savefig(out)
    return out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.probe", description="Leak, calibration, cloze accuracy and health of checkpoints."
    )
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", type=Path, help="a run's folder, or a checkpoint/step-N in it"
    )
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="default: the folder that the first run's is in")
    parser.add_argument("--items", metavar="N", type=int, default=500, help="cloze items; default: 500")
    parser.add_argument(
        "--sequences", metavar="N", type=int, help="held-out sequences; default: validation.sequences of the run"
    )
    options = parser.parse_args(arguments)
    for name in ("items", "sequences"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ConfigError(f"--{name} {number}: give 1 or more")
    out, shown = options.out, {}
    for checkpoint in options.checkpoints:
        began = time.monotonic()
        probe = Probe(checkpoint, options.sequences)
        run, step = Path(probe.config.job.dump_folder), probe.step
        out = out or run.parent
        result = {"recipe": Path(probe.config.recipe).stem, "hardware": device_module.get_device_name()}
        result |= {"torch": torch.__version__, "commit": commit(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        result |= probe.measure(options.items)
        del probe
        gc.collect()  # the next model may not fit beside this one
        file = out / run.name / "probe.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        steps = json.loads(file.read_bytes()) if file.exists() else {}
        steps = {
            str(key): value for key, value in sorted({**steps, str(step): result}.items(), key=lambda kv: int(kv[0]))
        }
        file.write_text(json.dumps(steps, indent=1) + "\n")
        shown[f"{run.name}, step {step}"] = result
        print(f"{file}: step {step} in {time.monotonic() - began:.0f} s", flush=True)
    print("\n" + probes_table(out, pad=True) + "\n")
    print(draw(shown, out / "reliability.png"))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        exit_with(error)
