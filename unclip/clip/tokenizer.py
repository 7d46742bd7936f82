"""CLIP's vocabulary: a byte-level BPE trained on the captions, or a pretrained WordPiece vocabulary pruned to need."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS, BOS = "<|pad|>", "<|endoftext|>", "<|startoftext|>"


def build_tokenizer(
    captions: Iterable[str], vocab_size: int = 8192, context_length: int = 77
) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE of at most `vocab_size` pieces, with CLIP's start and end tokens around a caption.

    Bytes make every string encodable. Ids 0, 1, 2 are padding, end, start: transformers' CLIP takes an end token
    of id 2 for an old configuration and would pool at the largest id instead of at the first end.
    Raises ValueError for a vocabulary too small for the 256 bytes and the three special tokens.
    """
    if vocab_size < 259:
        raise ValueError(f"vocab_size is {vocab_size}, the bytes and special tokens alone need 259; raise vocab_size.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, tokenizer.token_to_id(BOS)), (EOS, tokenizer.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=context_length
    )


def prune_wordpieces(
    tokenizer: PreTrainedTokenizerBase, captions: Iterable[str], vocab_size: int, context_length: int = 77
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The WordPiece tokenizer with at most `vocab_size` pieces, and the old ids of the kept rows in the new order.

    Kept: special tokens, single ASCII characters, all pieces the captions use, then the lowest ids, since BERT's
    vocabulary is sorted by frequency. WordPiece takes the longest piece that fits, so the captions, whose pieces all
    stay, are tokenised exactly as before. Raises ValueError where the captions alone need more than `vocab_size`.
    """
    backend: Any = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    vocab: dict[str, int] = state["model"]["vocab"]
    needed = {token["id"] for token in state["added_tokens"]}
    needed |= {
        i for piece, i in vocab.items() if piece.removeprefix("##").isascii() and len(piece.removeprefix("##")) == 1
    }
    unique = list(dict.fromkeys(captions))
    encodings = tokenizer(unique, add_special_tokens=False)["input_ids"] if unique else []
    needed.update(i for ids in encodings for i in ids)
    if len(needed) > vocab_size:
        raise ValueError(f"The captions need {len(needed)} word pieces, vocab_size is {vocab_size}; raise vocab_size.")
    words = (i for piece, i in sorted(vocab.items(), key=lambda item: item[1]) if piece.isascii() and "[" not in piece)
    for i in words:
        if len(needed) == vocab_size:
            break
        needed.add(i)
    kept = sorted(needed)
    new_id = {old: new for new, old in enumerate(kept)}
    state["model"]["vocab"] = {piece: new_id[i] for piece, i in vocab.items() if i in new_id}
    for token in state["added_tokens"]:
        token["id"] = new_id[token["id"]]
    state["truncation"] = state["padding"] = state["post_processor"] = None
    special = {key: tokenizer.special_tokens_map[key] for key in ("unk_token", "sep_token", "pad_token", "cls_token")}
    rebuilt = Tokenizer.from_str(json.dumps(state))
    start, end = special["cls_token"], special["sep_token"]
    rebuilt.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, rebuilt.token_to_id(token)) for token in (start, end)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=rebuilt, model_max_length=context_length, **special), kept
