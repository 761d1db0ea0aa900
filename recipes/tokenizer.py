"""The tokenizer: a given one, or a byte-level BPE trained on the corpus.

A byte-level BPE starts from the 256 bytes and merges the most frequent pair of neighbours until it has `vocab_size`
tokens. Every string has a UTF-8 encoding, so nothing is unknown and decoding gives back every text exactly, but for the
names of the special tokens. Its tokens are bytes, written as one printable character a byte; a token may end in the
middle of a character.

A tokenizer.json may carry more than the vocabulary: truncation, padding, BPE dropout, a template that surrounds every
text with tokens. Those are settings of whoever saved it. `DocumentTokenizer` switches them off, so a document is read
whole, the same way each time, between the markers that were asked for and no others.

Losses of different tokenizers cannot be compared by the token. They can by the byte: bits per byte is the loss in bits
summed over the tokens, divided by the UTF-8 bytes that these tokens stand for, which `token_bytes` counts.
"""

import functools
import hashlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs.errors import ConfigError, first_line, refuse
from configs.schema import JobConfig
from configs.titan import TokenizerHooks
from recipes.atomic import new_folder
from recipes.mixture import load_corpus
from recipes.progress import Progress
from recipes.tokens import read_manifest

logger = logging.getLogger("sparsetitan")

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
PIECE = 1 << 20  # characters that are encoded at once: a document of 39 MB as one piece takes 4 GB
WORD = 1024  # characters of one class in a row that the BPE is trained on: its time grows with their square
LONG_WORD = re.compile(rf"\w{{{WORD}}}|\s{{{WORD}}}|[^\w\s]{{{WORD}}}")
# Before a space that ends a word, no tokenizer's rule joins the two sides.
WORD_END = re.compile(r"[^\W_](?= \w)")
SAMPLE = "The naïve Café:\n\tx1 = 20,  # 漢字 👍\n"


class DocumentTokenizer(TokenizerHooks):
    """A folder's tokenizer, for documents of any length.

    `encode(text, add_bos, add_eos)` gives the ids of the whole text, with the markers that were asked for and no
    others. A document that spells out the name of a special token, as the source of a tokenizer does, means the text.
    """

    bos_id: int | None
    eos_id: int | None
    _spec = ""  # the tokenizer.json that was loaded

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.tokenizer.encode_special_tokens = True
        self._find_markers()

    def load_tokenizer(self, folder: str) -> Tokenizer:
        file = os.path.join(folder, "tokenizer.json")
        if not os.path.exists(file):
            if os.path.exists(os.path.join(folder, "tokenizer.model")):
                raise FileNotFoundError(
                    "tokenizer.json is missing, and tokenizer.model is not read; transformers makes one of the other: "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                )
            return super().load_tokenizer(folder)
        with open(file, encoding="utf-8") as stream:
            spec = json.load(stream)
        if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
            raise ValueError("tokenizer.json describes no model")
        spec |= {"truncation": None, "padding": None}
        if spec["model"].get("dropout"):
            spec["model"]["dropout"] = None
        self._spec = json.dumps(spec)
        return Tokenizer.from_str(self._spec)

    def _find_markers(self) -> None:
        """The tokens that the template puts around a text, where tokenizer_config.json names no markers."""
        bare, whole = (self.tokenizer.encode("x", add_special_tokens=special).ids for special in (False, True))
        place = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
        if not bare or place is None:
            return
        before, after = whole[:place], whole[place + len(bare) :]
        if self.bos_id is None and len(before) == 1 and before[0] != self.eos_id:
            self.bos_id = before[0]
            self.bos_token = self.tokenizer.id_to_token(self.bos_id)
        if self.eos_id is None and len(after) == 1 and after[0] != self.bos_id:
            self.eos_id = after[0]
            self.eos_token = self.tokenizer.id_to_token(self.eos_id)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:  # type: ignore[override]
        """The token ids of a text."""
        ids = [self.bos_id] if add_bos and self.bos_id is not None else []
        for piece in pieces(text):
            # Of the methods the one that does not look up where in the text each token is.
            (encoded,) = self.tokenizer.encode_batch_fast([piece], add_special_tokens=False)
            ids += encoded.ids
        if add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that the ids of a document depend on."""
        spec = json.loads(self._spec or self.tokenizer.to_str())
        spec = {key: spec.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        settings = json.dumps([spec, self.bos_id, self.eos_id], sort_keys=True)
        return hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()

    def keeps_every_text(self) -> bool:
        """Whether decoding gives back a text of many kinds, but for blanks around it."""
        return self.decode(self.encode(SAMPLE), skip_special_tokens=False).strip() == SAMPLE.strip()


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """A long text in pieces of `size` characters at most, cut at the end of a word where there is one."""
    start = 0
    while len(text) - start > size:
        window = text[start + size - min(size // 2, 4096) : start + size + 1]
        ends = [match.end() for match in WORD_END.finditer(window)]
        stop = start + size if not ends else start + size + 1 - len(window) + ends[-1]
        yield text[start:stop]
        start = stop
    yield text[start:]


def prepare_tokenizer(config: JobConfig) -> str:
    """The folder of the tokenizer to use, which is trained first if there is none.

    Of the ranks that call this at the same time, one trains and the others wait.

    Returns:
        A folder that torchtitan's HuggingFaceTokenizer and transformers' AutoTokenizer load.

    Raises:
        ConfigError: `tokenizer.path` holds no tokenizer, or the corpus cannot be read.
    """
    stores = load_corpus(config).token_stores()
    given = config.tokenizer.path or (os.path.join(stores[0].folder, "tokenizer") if stores else "")
    if given:
        _check_folder(given)
        load_corpus(config).check_tokenizer(load_tokenizer(given).fingerprint, given)
        return given
    folder = Path(config.tokenizer.cache_folder) / _cache_name(config)
    if not folder.exists():
        lock = FileLock(f"{folder}.lock")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            key, problem = "tokenizer.cache_folder", f"cannot be written ({error})"
            raise refuse(key, config.tokenizer.cache_folder, problem, "give another folder") from error
        try:
            if not folder.exists():  # another rank may have trained it while this one waited
                _train(config, folder)
        finally:
            lock.release()
    return str(folder)


def check_same_tokenizer(folder: str, run: Path, key: str) -> None:
    """Refuse to go on with another tokenizer than a run's own: to its model the same ids would be other text.

    A tokenizer that is trained here is another one when the corpus has changed.

    Args:
        folder: of the tokenizer.
        run: the run's folder, which holds a copy of its own.
        key: the configuration's key that names the run.

    Raises:
        ConfigError: they differ.
    """
    own, given = run / "tokenizer" / "tokenizer.json", Path(folder) / "tokenizer.json"
    if own.is_file() and given.is_file() and own.read_bytes() != given.read_bytes():
        raise ConfigError(
            f"{key}: the model in {run} was trained with another tokenizer than {folder} (has the corpus changed?): "
            f"set tokenizer.path = {own.parent}"
        )


def expected_vocabulary(config: JobConfig) -> int:
    """Size of the vocabulary that `prepare_tokenizer` will come to, without training anything.

    Raises:
        ConfigError: `tokenizer.path` holds no tokenizer.
    """
    if not config.tokenizer.path:
        tokens = [source.path for source in config.data.sources if source.type == "tokens" and source.weight > 0]
        return read_manifest(Path(tokens[0]))["vocabulary"] if tokens else config.tokenizer.vocab_size
    _check_folder(config.tokenizer.path)
    return len(token_bytes(config.tokenizer.path))


def _check_folder(path: str) -> None:
    remedy = "give a folder with a Hugging Face tokenizer.json, or leave it empty to train one on the corpus"
    if not os.path.isdir(path):
        raise refuse("tokenizer.path", path, "no such folder", remedy)
    try:
        tokenizer = DocumentTokenizer(path)
    except Exception as error:  # the tokenizers library raises nothing more special
        problem = f"no tokenizer can be loaded from it ({first_line(error)})"
        raise refuse("tokenizer.path", path, problem, remedy) from error
    if tokenizer.eos_id is None:
        logger.warning("the tokenizer in %s names no eos_token: documents will run into each other", path)
    if not tokenizer.keeps_every_text():
        logger.warning("the tokenizer in %s does not keep every text: decoding gives back another", path)


def _cache_name(config: JobConfig) -> str:
    """A readable name and a hash of everything that the trained tokenizer depends on."""
    corpus = load_corpus(config)
    spec = [
        [astuple(source) for source in config.data.sources],
        [part.files for part in corpus.parts],
        config.tokenizer.vocab_size,
        config.tokenizer.sample_bytes,
        config.data.validation_share,
        config.data.seed,
        sys.version if any(source.type == "stdlib" for source in config.data.sources) else "",
    ]
    digest = hashlib.blake2b(json.dumps(spec).encode(), digest_size=6).hexdigest()
    names = [Path(source.path).stem or source.type for source in config.data.sources if source.weight > 0]
    readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(names)).strip("-")[:40]
    return f"{readable or 'corpus'}-{config.tokenizer.vocab_size}-{digest}"


def _sample(config: JobConfig) -> Iterator[str]:
    """Training documents in their order, until they make `tokenizer.sample_bytes` or an epoch ends.

    Within words of more than `WORD` characters, such as a genome, they are cut.
    """
    left = config.tokenizer.sample_bytes
    for document in load_corpus(config).row(0, 1):
        for piece in pieces(document["text"]):
            start = 0
            for match in LONG_WORD.finditer(piece):
                yield piece[start : match.end()]
                start = match.end()
            yield piece[start:]
            left -= len(piece.encode("utf-8"))
            if left <= 0:
                return


def _sample_size(config: JobConfig) -> float:
    """About how many bytes `_sample` yields."""
    corpus, limit = load_corpus(config), config.tokenizer.sample_bytes
    if corpus.streamed:
        return limit
    there = sum(sum(part.report.bytes.values()) for part in corpus.parts)
    return max(1, min(limit, there * (1 - config.data.validation_share)))


def _train(config: JobConfig, folder: Path) -> None:
    vocab_size = config.tokenizer.vocab_size
    logger.info("training a byte-level BPE of %d tokens on the corpus", vocab_size)
    start = time.perf_counter()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reading = Progress("BPE: reading and counting words", _sample_size(config), logger.info)
    merging: list[Progress] = []

    def pieces() -> Iterator[str]:
        for piece in _sample(config):
            yield piece
            reading.advance(len(piece.encode("utf-8")))
        merging.append(Progress("BPE", 1, logger.info))

    def wait() -> None:
        for each in merging:  # the library does not say how far it is
            each.wait("merging the most frequent pairs, a fraction of the time that reading took")

    _in_thread(lambda: tokenizer.train_from_iterator(pieces(), trainer), wait)
    if tokenizer.get_vocab_size() < vocab_size:
        logger.warning("the corpus gives a vocabulary of %d tokens only", tokenizer.get_vocab_size())

    with new_folder(folder) as unfinished:
        tokenizer.save(str(unfinished / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "model_max_length": 10**9,
            "clean_up_tokenization_spaces": False,  # else transformers' decode drops spaces before punctuation
        }
        (unfinished / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    seconds = time.perf_counter() - start
    logger.info("trained a BPE of %d tokens in %.1f s: %s", tokenizer.get_vocab_size(), seconds, folder)


def _in_thread(function: Callable[[], object], wait: Callable[[], None]) -> None:
    """Call a function that heeds no signals, so that this thread still does; call `wait` ten times a second."""
    failed: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        wait()
    if failed:
        raise failed[0]


def build_tokenizer(job_config: JobConfig) -> DocumentTokenizer:
    """The prepared tokenizer, as torchtitan's TrainSpec asks for it."""
    return load_tokenizer(job_config.model.hf_assets_path)


def load_tokenizer(folder: str | os.PathLike) -> DocumentTokenizer:
    """A folder's tokenizer.

    Raises:
        ConfigError: there is none, or none that can be read.
    """
    try:
        return DocumentTokenizer(str(folder))
    except Exception as error:  # as in _check_folder
        remedy = "give the folder its own tokenizer.json back"
        raise ConfigError(f"{folder}: no tokenizer can be loaded ({first_line(error)}): {remedy}") from error


def _is_byte_level(spec: Any) -> bool:
    """Whether a ByteLevel step is somewhere in a (possibly nested) part of a tokenizer.json."""
    if isinstance(spec, dict):
        return spec.get("type") == "ByteLevel" or any(map(_is_byte_level, spec.values()))
    return isinstance(spec, list) and any(map(_is_byte_level, spec))


def token_bytes(tokenizer_folder: str) -> torch.Tensor:
    """UTF-8 bytes of text that each token stands for; 0 for special tokens.

    For a byte-level BPE the tokens of a text sum to the text's bytes exactly. For one in the manner of sentencepiece
    ("▁" is a space, "<0xE2>" a byte) they do up to the space that such a tokenizer may put before a text.

    Returns:
        int64 [vocabulary].
    """
    tokenizer = load_tokenizer(tokenizer_folder).tokenizer
    spec = json.loads(tokenizer.to_str())
    byte_level = _is_byte_level([spec["pre_tokenizer"], spec["decoder"]])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    sizes = torch.zeros(max(max(vocabulary.values()) + 1, tokenizer.get_vocab_size()), dtype=torch.int64)
    added = tokenizer.get_added_tokens_decoder()
    for token, index in vocabulary.items():
        if index in added:
            sizes[index] = 0 if added[index].special else len(added[index].content.encode("utf-8"))
        elif byte_level:
            sizes[index] = len(token)
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            sizes[index] = 1
        else:
            sizes[index] = len(token.replace("▁", " ").encode("utf-8"))
    return sizes
