"""Tiny random models of every kind of stack that groups of experts stand in, and what each is fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor
Config = dict[str, Any]
IDS = torch.randint(10, 60, (2, 9), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = _TEXT | {"num_key_value_heads": 1}
_HEADS = _GROUPED | {"head_dim": 8}
_SEEN = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "vocab_size": 64,
    "decoder_start_token_id": 0,
}


class Stack(NamedTuple):
    """One family and tower: the class a source is saved as, the Auto class it loads by, its config,
    what goes in, how its experts' linears are called, and which build of several it is.
    """

    family: str
    tower: str
    cls: str
    auto: str
    config: Config
    inputs: Callable[[Any], dict[str, Any]]
    linears: tuple[str, ...]
    says: str = "auto"  # --tower, where auto does not mean it
    build: str = ""
    layers: int = 2

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.family, self.tower, self.build)))

    def save(self, folder: Path) -> Path:
        """A random model whose biases and norms are random too."""
        import transformers

        torch.manual_seed(3)
        made = transformers.CONFIG_MAPPING[self.family](**self.config)
        model = getattr(transformers, self.cls)(made).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:
                    parameter += torch.randn_like(parameter) * 0.1
                elif parameter.numel() and parameter.std() < 0.1:
                    parameter *= 5
        model.save_pretrained(folder)
        return folder


def _ids(config: Any) -> dict[str, Any]:
    return {"input_ids": IDS}


def _pixels(config: Any) -> dict[str, Any]:
    return {"pixel_values": PIXELS}


def _both(config: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "pixel_values": PIXELS}


def _decoded(config: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}


def _heard(config: Any) -> dict[str, Any]:
    heard = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": heard, "decoder_input_ids": IDS}


def _audio(config: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(2))}


def _images(tokens: int) -> Callable[[Any], dict[str, Any]]:
    """Text with as many image tokens as an image becomes."""

    def inputs(config: Any) -> dict[str, Any]:
        ids = IDS.clone()
        ids[:, 1 : 1 + tokens] = config.image_token_id
        return {"input_ids": ids, "pixel_values": PIXELS}

    return inputs


def _grid(config: Any) -> dict[str, Any]:
    """Two images of 4 x 4 patches, each merged to 4 tokens."""
    ids = IDS.clone()
    ids[:, 1:5] = config.image_token_id
    size = 3 * config.vision_config.patch_size**2 * config.vision_config.temporal_patch_size
    pixels = torch.randn(32, size, generator=torch.Generator().manual_seed(2))
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
    }


_CAUSAL, _MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"
_SEQ2SEQ, _CLASSES = "AutoModelForSeq2SeqLM", "AutoModelForImageClassification"
_VLM = "AutoModelForImageTextToText"
_GATED, _TWO, _FC = (
    ("gate_proj", "up_proj", "down_proj"),
    ("intermediate_dense", "output_dense"),
    ("fc1", "fc2"),
)
_QWEN2_VL = {
    "text_config": _GROUPED
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "vision_config": {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
    },
    "image_token_id": 3,
    "video_token_id": 4,
    "vision_start_token_id": 5,
    "vision_end_token_id": 6,
}
_LLAVA = {
    "text_config": {"model_type": "llama", **_GROUPED},
    "vision_config": {"model_type": "clip_vision_model", **_SEEN},
    "image_token_id": 3,
    "image_token_index": 3,
    "image_seq_length": 4,
    "vision_feature_layer": -1,
}
_INTERNVL = {
    "text_config": {"model_type": "qwen2", **_GROUPED},
    "vision_config": {**_SEEN, "image_size": [16, 16], "patch_size": [8, 8]},
    "image_token_id": 3,
    "image_seq_length": 1,
    "downsample_ratio": 0.5,
}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    **_IDS,
}
_TWO_TOWERS = {"text_config": _TEXT | _IDS, "vision_config": _SEEN, "projection_dim": 8}


def _text(family: str, cls: str, config: Config, linears: tuple[str, ...] = _GATED) -> Stack:
    return Stack(family, "text", cls, _CAUSAL, config, _ids, linears)


def _encoder(family: str, cls: str, config: Config, linears: tuple[str, ...] = _TWO) -> Stack:
    return Stack(family, "text", cls, _MASKED, config, _ids, linears)


STACKS = (
    _text("llama", "LlamaForCausalLM", _GROUPED),
    _text("mistral", "MistralForCausalLM", _GROUPED),
    _text("qwen2", "Qwen2ForCausalLM", _GROUPED),
    _text("qwen3", "Qwen3ForCausalLM", _HEADS),
    _text("phi3", "Phi3ForCausalLM", _GROUPED | _IDS, ("gate_up_proj", "down_proj")),
    _text("gemma", "GemmaForCausalLM", _HEADS),
    _text("gemma2", "Gemma2ForCausalLM", _HEADS),
    _text("gemma3_text", "Gemma3ForCausalLM", _HEADS),
    _text("gpt2", "GPT2LMHeadModel",
          {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}, ("c_fc", "c_proj")),
    _text("gpt_neox", "GPTNeoXForCausalLM", _TEXT, ("dense_h_to_4h", "dense_4h_to_h")),
    _text("falcon", "FalconForCausalLM", {**_TEXT, "new_decoder_architecture": False},
          ("dense_h_to_4h", "dense_4h_to_h")),
    _text("stablelm", "StableLmForCausalLM", _GROUPED),
    _text("opt", "OPTForCausalLM",
          {**_TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16}, _FC),
    _encoder("bert", "BertForMaskedLM", _TEXT),
    _encoder("roberta", "RobertaForMaskedLM", _TEXT | _IDS),
    _encoder("electra", "ElectraForMaskedLM", {**_TEXT, "embedding_size": 8}),
    _encoder("deberta-v2", "DebertaV2ForMaskedLM", _TEXT),
    _encoder("distilbert", "DistilBertForMaskedLM",
             {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64,
              "max_position_embeddings": 64}, ("lin1", "lin2")),
    Stack("vit", "vision", "ViTForImageClassification", _CLASSES, _SEEN, _pixels, _FC),
    Stack("dinov2", "vision", "Dinov2Model", "AutoModel", {**_SEEN, "mlp_ratio": 2}, _pixels, _FC),
    Stack("clip", "text", "CLIPModel", "AutoModel", _TWO_TOWERS, _both, _FC),
    Stack("clip", "vision", "CLIPModel", "AutoModel", _TWO_TOWERS, _both, _FC, "vision"),
    Stack("siglip", "text", "SiglipModel", "AutoModel", _TWO_TOWERS, _both, _FC),
    Stack("siglip", "vision", "SiglipModel", "AutoModel", _TWO_TOWERS, _both, _FC, "vision"),
    Stack("t5", "encoder", "T5ForConditionalGeneration", _SEQ2SEQ, _T5, _decoded,
          ("wi", "wo"), "encoder", layers=3),
    Stack("t5", "decoder", "T5ForConditionalGeneration", _SEQ2SEQ,
          {**_T5, "feed_forward_proj": "gated-gelu"}, _decoded, ("wi_0", "wi_1", "wo"), "decoder"),
    Stack("whisper", "encoder", "WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq",
          {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32,
           "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
           "vocab_size": 64, "max_target_positions": 64, "max_source_positions": 8,
           "num_mel_bins": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
           "decoder_start_token_id": 1}, _heard, _FC, "encoder"),
    Stack("qwen2_vl", "text", "Qwen2VLForConditionalGeneration", _VLM, _QWEN2_VL, _grid, _GATED),
    Stack("qwen2_vl", "vision", "Qwen2VLForConditionalGeneration", _VLM, _QWEN2_VL, _grid, _FC,
          "vision"),
    Stack("llava", "text", "LlavaForConditionalGeneration", _VLM, _LLAVA, _images(4), _GATED),
    Stack("llava", "vision", "LlavaForConditionalGeneration", _VLM, _LLAVA, _images(4), _FC,
          "vision"),
    Stack("internvl", "text", "InternVLForConditionalGeneration", _VLM, _INTERNVL, _images(1),
          _GATED),
    Stack("internvl", "vision", "InternVLForConditionalGeneration", _VLM, _INTERNVL, _images(1),
          _FC, "vision"),
    Stack("dinov2", "vision", "Dinov2Model", "AutoModel", {**_SEEN, "use_swiglu_ffn": True}, _pixels,
          _GATED, build="giant"),
    _encoder("albert", "AlbertForMaskedLM", {**_TEXT, "embedding_size": 8},
             ("ffn", "ffn_output"))._replace(layers=1),
    _text("bloom", "BloomForCausalLM",
          {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64},
          ("dense_h_to_4h", "dense_4h_to_h")),
    Stack("bart", "decoder", "BartForConditionalGeneration", _SEQ2SEQ, _BART, _decoded, _FC,
          "decoder"),
)  # fmt: skip
# Run with all tests only: each is as one of those above, by data alone.
SLOW = (
    _text("mpt", "MptForCausalLM", {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 64},
          ("up_proj", "down_proj")),
    Stack("bart", "encoder", "BartForConditionalGeneration", _SEQ2SEQ, _BART, _decoded, _FC,
          "encoder"),
    Stack("mbart", "decoder", "MBartForConditionalGeneration", _SEQ2SEQ, _BART, _decoded, _FC,
          "decoder"),
    Stack("pegasus", "encoder", "PegasusForConditionalGeneration", _SEQ2SEQ, _BART, _decoded, _FC,
          "encoder"),
    Stack("dinov3_vit", "vision", "DINOv3ViTModel", "AutoModel", _SEEN, _pixels,
          ("up_proj", "down_proj")),
    Stack("dinov3_vit", "vision", "DINOv3ViTModel", "AutoModel", {**_SEEN, "use_gated_mlp": True},
          _pixels, _GATED, build="gated"),
    _encoder("modernbert", "ModernBertForMaskedLM", _TEXT | _IDS, ("Wi", "Wo")),
    _text("recurrent_gemma", "RecurrentGemmaForCausalLM", {**_HEADS, "num_hidden_layers": 3,
          "lru_width": 16, "attention_window_size": 8}, _GATED)._replace(layers=3),
    Stack("wav2vec2", "audio", "Wav2Vec2ForPreTraining", "AutoModelForPreTraining",
          {**_TEXT, "conv_dim": [8], "conv_kernel": [10], "conv_stride": [5],
           "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}, _audio,
          ("intermediate_dense", "output_dense")),
)  # fmt: skip
BY_NAME: Mapping[str, Stack] = {stack.name: stack for stack in (*STACKS, *SLOW)}
