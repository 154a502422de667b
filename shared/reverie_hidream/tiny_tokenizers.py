"""Tokenizers of the tiny checkpoint: real algorithms, trained here on a small corpus.

CLIP's lower-casing byte-level BPE with end-of-word marks, T5's unigram model and Llama-3's byte-level BPE. Their
special tokens, post-processors and padding habits are those of the released checkpoints. The corpus is
`tiny_corpus.txt` beside this file.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

CLIP_VOCABULARY_SIZE = 1024
T5_VOCABULARY_SIZE = 640
LLAMA_VOCABULARY_SIZE = 896

_CLIP_START, _CLIP_END = "<|startoftext|>", "<|endoftext|>"
_PRIVATE_USE = 0xE000
_LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def corpus_lines() -> list[str]:
    """The training corpus, one caption a line."""
    return files("reverie_hidream").joinpath("tiny_corpus.txt").read_text(encoding="utf-8").splitlines()


def clip_tokenizer(lines: Sequence[str], *, model_max_length: int, pad_token: str = _CLIP_END) -> CLIPTokenizer:
    """Train CLIP's BPE; the end token has the highest id, as CLIP's legacy pooling by argmax expects."""
    merges = _clip_merges(lines)
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*tokens, _CLIP_START, _CLIP_END]))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=model_max_length, pad_token=pad_token)


def t5_tokenizer(lines: Sequence[str], *, model_max_length: int) -> T5Tokenizer:
    """Train T5's unigram model, with pad 0, end 1 and unknown 2."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always", split=True)]
    )
    special = ["<pad>", "</s>", unknown := "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=T5_VOCABULARY_SIZE, special_tokens=special, unk_token=unknown, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return T5Tokenizer(vocab=_stable_pieces(tokenizer, special), extra_ids=0, model_max_length=model_max_length)


def llama_tokenizer(lines: Sequence[str], *, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train Llama-3's byte-level BPE: whole words bypass the merges, BOS is added, no pad token is set."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(_LLAMA_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LLAMA_VOCABULARY_SIZE, initial_alphabet=_byte_alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(list(_LLAMA_SPECIAL))
    start = _LLAMA_SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[start, "$A"], pair=[start, "$A", start, "$B"], special_tokens=[(start, tokenizer.token_to_id(start))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=_LLAMA_SPECIAL[-1],
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _clip_merges(lines: Sequence[str]) -> list[tuple[str, str]]:
    """Learn merges with each word's last letter written as one private character instead of `<letter></w>`.

    The trainer's own end_of_word_suffix numbers letters in hash order: ties would break differently in each process.
    """
    alphabet = _byte_alphabet()
    last = {letter: chr(_PRIVATE_USE + index) for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_VOCABULARY_SIZE - 2, initial_alphabet=[*alphabet, *last.values()], show_progress=False
    )
    words = [word[:-1] + last[word[-1]] for line in lines for word in _clip_words(line)]
    tokenizer.train_from_iterator(words, trainer)
    spelled = str.maketrans({mark: f"{letter}</w>" for letter, mark in last.items()})
    return [(left.translate(spelled), right.translate(spelled)) for left, right in _state(tokenizer)["model"]["merges"]]


def _clip_words(line: str) -> list[str]:
    """Split as CLIP does, through the empty tokenizer's own normaliser and pre-tokeniser."""
    backend = CLIPTokenizer().backend_tokenizer
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(line))]


def _byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _state(tokenizer: Tokenizer) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    return state


def _stable_pieces(tokenizer: Tokenizer, special: Sequence[str]) -> list[tuple[str, float]]:
    pieces: list[tuple[str, float]] = [(piece, score) for piece, score in _state(tokenizer)["model"]["vocab"]]
    learnt = [(piece, round(score, 3)) for piece, score in pieces if piece not in special]
    return [(piece, 0.0) for piece in special] + sorted(learnt, key=lambda entry: (-entry[1], entry[0]))
