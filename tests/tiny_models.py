"""Models of a few thousand weights, saved in the layout of the real ones."""

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers.normalizers import BertNormalizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MistralConfig,
    MistralModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

TRAINING_TEXT = [
    "Instruct: Given a search query, retrieve the documents that answer it\nQuery: a late bicycle with a broken brake",
    "the hotel by the lake never paid the deposit for two cargo bikes, they said the battery was empty",
    "0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Like Qwen's: byte-level BPE, nothing normalised, an end token after every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    end = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=4096
    )


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """Like BERT's: lower-cased word pieces between [CLS] and [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Not trained: equally frequent pieces come out of a training in another order each time, and with them the models'
    # vectors, rankings, and all that a test may see of them.
    letters = sorted({letter for text in TRAINING_TEXT for letter in text.lower() if not letter.isspace()})
    words = sorted({word for text in TRAINING_TEXT for word in re.findall(r"[a-z]{2,}", text.lower())})
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def save_tiny_models(folder: Path) -> dict[str, Path]:
    """Make and save a Qwen3 and a Mistral (last-token pooling), a BERT (mean pooling), a BERT cross-encoder, a causal Qwen3."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.5,
    }
    byte_level, word_piece = byte_level_tokenizer(), word_piece_tokenizer()
    decoder = {**shape, "vocab_size": len(byte_level), "num_key_value_heads": 2, "max_position_embeddings": 4096}
    encoder = {**shape, "vocab_size": len(word_piece), "max_position_embeddings": 64}
    plain = {
        "qwen3": (Qwen3Model(Qwen3Config(**decoder, head_dim=8)), byte_level, "lasttoken"),
        "mistral": (MistralModel(MistralConfig(**decoder)), byte_level, "lasttoken"),
        "bert": (BertModel(BertConfig(**encoder)), word_piece, "mean"),
    }
    saved = {}
    for name, (model, tokenizer, pooling) in plain.items():
        model.save_pretrained(folder / f"plain-{name}")
        tokenizer.save_pretrained(folder / f"plain-{name}")
        transformer = Transformer(str(folder / f"plain-{name}"))
        modules = [transformer, Pooling(32, pooling_mode=pooling), Normalize()]
        saved[name] = folder / f"tiny-{name}"
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(saved[name]))
    torch.manual_seed(1)
    saved["cross-encoder"] = folder / "cross-encoder" / "tiny"
    BertForSequenceClassification(BertConfig(**encoder, num_labels=1)).save_pretrained(saved["cross-encoder"])
    word_piece.save_pretrained(saved["cross-encoder"])
    torch.manual_seed(2)
    saved["causal"] = folder / "tiny-causal"
    byte_level.add_tokens(["yes", "no"])
    causal = {**decoder, "vocab_size": len(byte_level), "tie_word_embeddings": True}
    Qwen3ForCausalLM(Qwen3Config(**causal, head_dim=8)).save_pretrained(saved["causal"])
    byte_level.save_pretrained(saved["causal"])
    return saved
