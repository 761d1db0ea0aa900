"""Probe checkpoints beyond the loss: information leaks from later tokens, calibration, cloze accuracy, sparsity health.

    python -m scripts.probe outputs/venom                                     # the newest checkpoint of a run
    python -m scripts.probe outputs/studies/recipes_160m/*/checkpoint/step-* --out docs/studies/recipes_160m

Each checkpoint gets an entry, keyed by its step, in `OUT/RUN/probe.json`. A table is printed and `OUT/reliability.png`
is drawn. Everything is measured on held-out documents, in every mode in which the model's FFNs can run:
`inference_modes` of models/feed_forward.py names and explains the modes. On a CPU the defaults are small
(CPU_SEQUENCES, CPU_ITEMS), so standard errors are larger. Lines show the time left (recipes/progress.py).

**Leak.** In a sparse phase a token's output depends on later tokens: they take part in choosing the pattern of its
block, and sorting by the router affects which block it is in. To measure this, later text is replaced by text of
another sequence. In a causal model the predictions before the replacement do not change; any change is the leak:

    leak_kl         KL(before || after) of the next-token distributions, nats per token
    leak_logprob    mean absolute change of the next token's log-probability, nats
    leak_argmax     share of the positions whose most likely token changed
    leak_gain       loss on the true text with the replacement minus without it: the benefit of seeing later tokens

    leak_*          over the first half of every sequence, when all second halves of the micro-batch are replaced
    own_*           the same, when only the sequence's own second half is replaced
    next_*          at the last position before the replacement, for CUTS random starts in each sequence;
                    next_gain_error is the standard error of next_gain

Only next_* predict a token that was replaced, so only they show whether a model reads its next token from the pattern.
If blocks are consecutive tokens and a block ends with the first half, leak_* and own_* are zero.

The difference between the losses of the causal modes and those of `sparse` (`dense W1` if the phase cuts W1 too) and
`dense` is the cost of choosing the pattern from earlier tokens only.

**Calibration.** The expected calibration error of the most likely token (Guo et al., ICML 2017), with BINS bins of
equal width in the confidence c: sum over bins of share * |accuracy - mean c|. The picture shows accuracy against
confidence.

**Cloze.** The model chooses the last word of a line: the true word or one of three others from the same document,
scored by the summed log-probabilities of its tokens given the preceding text. The items depend only on the held-out
documents, not on the tokenizer. Chance is 25%. Measured with dense inference.

**Health.** The sparsity health of recipes/metrics.py, for each layer.
"""

import gc
import json
import math
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

if not __package__:  # started as `python scripts/probe.py`: look imports up from the repository, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from configs.errors import ConfigError, run_program
from configs.repository import commit
from configs.schema import JobConfig
from configs.titan import device_module, device_type
from kernels import FeedForwardSparsity
from models.feed_forward import inference_modes
from recipes.atomic import write_atomically
from recipes.data import validation_sequences
from recipes.mixture import load_corpus
from recipes.pipeline import micro_batch_size
from recipes.progress import Progress
from recipes.restore import find_checkpoint
from recipes.tokenizer import load_tokenizer, token_bytes
from scripts.options import TERMS, Parser, add_out, check_bounds
from scripts.pictures import DPI, GREY, STYLE, run_colours, save
from scripts.tables import probes_table

BINS = 15
CHOICES = 4
CONTEXT = 512  # tokens before a cloze item's word, at most
OWN = 8  # sequences per micro-batch for own_*, at most; each takes a forward pass
CUTS = 16  # replacements per sequence for next_*; each takes a forward pass of the micro-batch
ITEMS = 500
CPU_SEQUENCES = 8
CPU_ITEMS = 50
LINE_END = re.compile(r"(?m)( ?)(?<!\w)([^\W\d]\w{2,})[^\w\n]*$")
WORD = re.compile(r"[^\W\d]\w{2,}")


class Probe:
    """Measures one checkpoint. All methods leave the model as it was."""

    def __init__(self, path: str, sequences: int | None = None) -> None:
        self.checkpoint = find_checkpoint(path)
        self.config = config = self.checkpoint.config
        self.tokenizer = load_tokenizer(str(self.checkpoint.tokenizer))
        self.bytes = token_bytes(str(self.checkpoint.tokenizer))
        batch_size = micro_batch_size(config, sparse=True)
        if sequences is None and device_type == "cpu":
            sequences = min(config.validation.sequences, max(CPU_SEQUENCES, batch_size))
        config.validation.sequences = sequences or config.validation.sequences
        rows = validation_sequences(self.tokenizer, config)
        # Only full micro-batches: in a smaller one, fewer tokens would share a pattern than in training.
        size = min(batch_size, len(rows))
        self.batches = rows[: len(rows) // size * size].split(size)
        self.model, self.sparsity = self.checkpoint.model(torch.device(device_type), self.batches[0][:, :-1])
        self.progress: Progress | None = None

    def measure(self, items: int, dense_only: bool = False) -> dict[str, Any]:
        """All measurements, in the format of probe.json; with `dense_only`, those of dense inference."""
        result: dict[str, Any] = {"sequences": sum(map(len, self.batches)), "bins": BINS, "modes": {}}
        sparsity = FeedForwardSparsity() if dense_only else self.checkpoint.args.sparsity
        modes = inference_modes(sparsity, self.config.training.seq_len, bool(self.checkpoint.args.num_experts))
        where = f"{self.checkpoint.run.name}, step {self.checkpoint.step}"
        self.progress = Progress(where, len(modes) * self.tokens_per_mode() + items * self.tokens_per_item())
        with torch.no_grad(), self.checkpoint.autocast(torch.device(device_type)):
            for place, (name, mode) in enumerate(modes.items(), 1):
                print(f"{where}: {name}, {place} of {len(modes)}", flush=True)
                self.sparsity.run_as(mode)
                result["modes"][name] = self.score() | self.leak() | self.next_token()
            self.sparsity.run_as(None)
            self.model.train()  # in evaluation the FFNs measure the energy, which takes time
            result["cloze"] = self.cloze(items)
            self.model.eval()
        return result

    def logits(self, tokens: Tensor) -> Tensor:
        """`[B, S]` int64 to `[B, S, vocabulary]`, on the device."""
        logits = self.model(tokens.to(device_type))
        if self.progress:
            self.progress.advance(tokens.numel())
        return logits

    def tokens_per_mode(self) -> int:
        """Tokens of the forward passes of score(), leak() and next_token()."""
        total = 0
        for batch in self.batches:
            alone = len(range(0, len(batch), -(-len(batch) // OWN)))
            total += (1 + 2 + alone + 1 + CUTS) * batch[:, :-1].numel()
        return total

    def tokens_per_item(self) -> int:
        """Tokens of a cloze item's forward pass, at most."""
        return CHOICES * min(CONTEXT, self.config.training.seq_len)

    def score(self) -> dict[str, Any]:
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
            "health": self.sparsity.health(),
        }

    def leak(self) -> dict[str, float]:
        """How the predictions in the first halves of the sequences change when the second halves are replaced."""
        sequences = torch.cat(self.batches)
        half = (sequences.shape[1] - 1) // 2
        if len(sequences) < 2 or half < 1:
            raise ConfigError(
                f"validation.sequences = {len(sequences)} of training.seq_len = {sequences.shape[1] - 1} tokens: "
                "the leak needs another sequence to replace later text with: give two sequences or more of two tokens"
            )
        every: list[Tensor] = []
        own: list[Tensor] = []
        self.model.train()  # in evaluation mode the FFNs also measure the energy, which takes time
        for batch, other in self.pairs():
            other = torch.cat([batch[:, :half], other[:, half:]], 1)
            before = self.logits(batch[:, :-1])[:, :half]
            after = self.logits(other[:, :-1])[:, :half]
            labels = batch[:, 1 : half + 1].to(before.device)
            every += map(_changes, before, after, labels)  # one sequence at a time: logits are large
            for row in range(0, len(batch), -(-len(batch) // OWN)):
                alone = batch.clone()
                alone[row] = other[row]
                own.append(_changes(before[row], self.logits(alone[:, :-1])[row, :half], labels[row]))
        self.model.eval()
        return _means("leak", torch.cat(every)) | _means("own", torch.cat(own))

    def next_token(self) -> dict[str, float]:
        """How the prediction at the last position before a replacement that starts at a random place changes."""
        chance = torch.Generator().manual_seed(0)  # the same in every mode and run of this length
        changes: list[Tensor] = []
        self.model.train()
        for batch, other in self.pairs():
            before, rows = self.logits(batch[:, :-1]), torch.arange(len(batch))
            for _ in range(CUTS):
                cuts = torch.randint(1, batch.shape[1] - 1, (len(batch),), generator=chance)
                mixed = torch.where(torch.arange(batch.shape[1]) < cuts[:, None], batch, other)
                after, labels = self.logits(mixed[:, :-1]), batch[rows, cuts].to(before.device)
                changes.append(_changes(before[rows, cuts - 1], after[rows, cuts - 1], labels))
        self.model.eval()
        found = torch.cat(changes)
        return _means("next", found) | {"next_gain_error": float(found[:, -1].std() / math.sqrt(len(found)))}

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each micro-batch `[B, S + 1]`, and the sequences, of the same shape, that replace its own."""
        return zip(self.batches, torch.cat(self.batches).roll(1, 0).split(len(self.batches[0])), strict=True)

    def cloze(self, items: int) -> dict[str, Any]:
        """Share of the items whose true word has the highest score, and its standard error; None without items.

        An item is left out where one of its words does not fit into a sequence, with a token before it.
        """
        limit = min(CONTEXT, self.config.training.seq_len)
        right = count = left_out = 0
        for context, words in cloze_items(self.config, items):
            # More characters than the tokens that fit could have.
            before = self.tokenizer.encode(context[-16 * limit :], add_bos=True, add_eos=False)
            options = [self.tokenizer.encode(word, add_bos=False, add_eos=False) for word in words]
            longest = max(map(len, options))
            if longest > limit:
                left_out += 1
                continue
            before = before[-(limit + 1 - longest) :]
            # Padding after the shorter options does not affect a causal model.
            rows = torch.tensor([before + option + [0] * (longest - len(option)) for option in options])
            logprobs = self.logits(rows[:, :-1])[:, len(before) - 1 :].float().log_softmax(-1).cpu()
            picked = logprobs.gather(-1, rows[:, len(before) :, None])[..., 0]
            scores = [float(picked[place, : len(option)].sum()) for place, option in enumerate(options)]
            right += scores[0] > max(scores[1:])
            count += 1
        if left_out:
            print(f"{left_out} cloze items are left out: they have words of more than {limit} tokens", flush=True)
        if not count:
            return {"items": 0, "choices": CHOICES, "accuracy": None, "standard_error": None}
        accuracy = right / count
        error = math.sqrt(accuracy * (1 - accuracy) / count)
        return {"items": count, "choices": CHOICES, "accuracy": accuracy, "standard_error": error}


def _changes(before: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """For each position: KL, |change of log p(label)|, whether the arg max changed, and the increase of the loss.

    Args:
        before, after: `[T, vocabulary]`, logits.
        labels: `[T]` int64.

    Returns:
        float64 `[T, 4]`, on the CPU.
    """
    old, new = before.float().log_softmax(-1), after.float().log_softmax(-1)
    kl = (old.exp() * (old - new)).sum(-1)
    change = (old - new).gather(-1, labels[:, None])[:, 0]
    flips = old.argmax(-1) != new.argmax(-1)
    return torch.stack([each.double() for each in (kl, change.abs(), flips, change)], 1).cpu()


def _means(prefix: str, changes: Tensor) -> dict[str, float]:
    names = (f"{prefix}_{name}" for name in ("kl", "logprob", "argmax", "gain"))
    return dict(zip(names, changes.mean(0).tolist(), strict=True))


def cloze_items(config: JobConfig, count: int) -> Iterator[tuple[str, list[str]]]:
    """Cloze items: the text before the last word of a line, and that word followed by three others of the document.

    At most two items per held-out document, after its first 200 characters; a space before the word is part of it.
    """
    made = 0
    for document in load_corpus(config).held_out() or []:
        text = document["text"]
        chance = random.Random(f"{text[:1000]} {len(text)}")  # the items of a document do not depend on other documents
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


def draw(results: dict[str, dict[str, Any]], out: Path, data: Iterable[Path]) -> Path:
    """Draw accuracy against confidence, and the distribution of the confidence, for dense inference; return `out`.

    Args:
        results: by what the legend calls it, of one model.
        out: the PNG to write.
        data: the files that hold the results.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(6.5, 7.0), dpi=DPI, layout="constrained")
        main, below = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        main.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="perfectly calibrated")
        colours = run_colours((name, result["recipe"]) for name, result in results.items())
        for colour, (name, result) in zip(colours, results.items(), strict=True):
            dense = result["modes"]["dense"]
            tokens, confidence, accuracy = (dense["reliability"][key] for key in ("tokens", "confidence", "accuracy"))
            full = [place for place, number in enumerate(tokens) if number]
            x, y = ([values[place] for place in full] for values in (confidence, accuracy))
            label = f"{name}: ECE {100 * dense['ece']:.2f}%"
            main.plot(x, y, color=colour, marker="o", markersize=3.5, linewidth=1.4, label=label)
            below.plot(x, [tokens[place] / sum(tokens) for place in full], color=colour, linewidth=1.4)
        main.set_title("Calibration of next-token predictions, dense inference")
        main.set_ylabel("accuracy of the most likely token")
        main.legend(loc="upper left")
        below.set_ylabel("share of tokens")
        below.set_xlabel(f"confidence, {BINS} bins")
        below.set_ylim(bottom=0)
        return save(figure, out, data)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m scripts.probe",
        description="Information leakage from later tokens (leak), calibration, cloze accuracy and sparsity health.",
        epilog=TERMS,
    )
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", help="a run's folder, or a checkpoint/step-N in it"
    )
    add_out(parser, "FOLDER", "default: the parent of the first run's folder")
    parser.add_argument("--items", metavar="N", type=int, help=f"cloze items; default: {ITEMS}, on a CPU {CPU_ITEMS}")
    parser.add_argument(
        "--sequences",
        metavar="N",
        type=int,
        help="held-out sequences; default: validation.sequences of the run, on a CPU at most "
        f"{CPU_SEQUENCES} or one micro-batch, whichever is more",
    )
    parser.add_argument("--dense", action="store_true", help="measure dense inference only, as after the last phase")
    options = parser.parse_args(arguments)
    for name in ("items", "sequences"):
        check_bounds(options, name, 1)
    items = options.items or (CPU_ITEMS if device_type == "cpu" else ITEMS)
    out = options.out
    shown: dict[str, dict[str, Any]] = {}
    files: list[Path] = []
    for checkpoint in options.checkpoints:
        began = time.monotonic()
        probe = Probe(checkpoint, options.sequences)
        run, step = probe.checkpoint.run, probe.checkpoint.step
        out = out or run.parent
        result = {"recipe": Path(probe.config.recipe).stem, "hardware": device_module.get_device_name()}
        result |= {"torch": torch.__version__, "commit": commit(), "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            result |= probe.measure(items, options.dense)
        except KeyboardInterrupt:
            kept = f", kept in {out}/RUN/probe.json" if shown else ""
            raise KeyboardInterrupt(f"{len(shown)} of {len(options.checkpoints)} models are measured{kept}") from None
        del probe
        gc.collect()  # the next model may not fit beside this one
        file = out / run.name / "probe.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        steps = json.loads(file.read_bytes()) if file.exists() else {}
        steps = {
            str(key): value for key, value in sorted({**steps, str(step): result}.items(), key=lambda kv: int(kv[0]))
        }
        write_atomically(file, json.dumps(steps, indent=1) + "\n")
        shown[f"{run.name}, step {step}"] = result
        files.append(file)
        print(f"{file}: step {step} in {time.monotonic() - began:.0f} s", flush=True)
    print("\n" + probes_table(out, pad=True) + "\n")
    print(draw(shown, out / "reliability.png", dict.fromkeys(files)))


if __name__ == "__main__":
    run_program(main)
