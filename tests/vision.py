"""Tiny random vision-language checkpoints with their processors, pictures, and the passes over both without a cache."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from architectures import randomise
from ivg.models.processor import load_processor, without_videos
from ivg.testing import byte_tokenizer
from naive import device_of

KINDS = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3")
MORE = ("llava_next", "idefics3")
_PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
_QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_GEMMA = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")
_SIDE = {"height": 32, "width": 32}
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def template(image):
    """A chat template that reads texts and lists of parts, with ``image`` where a picture is."""
    return (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'image' %}" + image + "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


def _tokenizer(special=(), **more):
    """The byte tokenizer with further special tokens."""
    ends = dict.fromkeys(("eos_token", "pad_token", "bos_token"), "<eos>")
    made = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, **ends, **more)
    made.add_special_tokens({"additional_special_tokens": [*special, "<same>"]})
    return made


def _text(tok, **more):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return {**sizes, **ends, "vocab_size": len(tok), "max_position_embeddings": 512, **more}


def _ids(tok, names, tokens):
    return dict(zip(names, map(tok.convert_tokens_to_ids, tokens), strict=True))


def _llava():
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tok = _tokenizer(["<image>"])
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=_SIDE),
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    ids = _ids(tok, ["image_token_id"], ["<image>"])
    tower, text = _TOWER | {"model_type": "clip_vision_model"}, _text(tok, model_type="llama")
    return processor, AutoConfig.for_model("llava", vision_config=tower, text_config=text, vision_feature_layer=-1, **ids)


def _llava_next():
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tok, grid = _tokenizer(["<image>"]), [[32, 64], [64, 32]]
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=_SIDE, image_grid_pinpoints=grid),
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    more = {"vision_feature_layer": -1, "image_grid_pinpoints": grid, **_ids(tok, ["image_token_id"], ["<image>"])}
    tower, text = _TOWER | {"model_type": "clip_vision_model"}, _text(tok, model_type="llama")
    return processor, AutoConfig.for_model("llava_next", vision_config=tower, text_config=text, **more)


def _idefics3():
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tok = _tokenizer(["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"])
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False)
    processor = Idefics3Processor(images, tok, image_seq_len=4, chat_template=template("<image>"))
    tower, text = _TOWER | {"model_type": "idefics3_vision"}, _text(tok, model_type="llama")
    ids = _ids(tok, ["image_token_id"], ["<image>"])
    return processor, AutoConfig.for_model("idefics3", vision_config=tower, text_config=text, scale_factor=2, **ids)


def _qwen(kind):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tok = _tokenizer(_QWEN)
    pixels = {"shortest_edge": 64, "longest_edge": 4096}
    images = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, size=pixels)
    processor = without_videos(getattr(transformers, _PROCESSORS[kind]))(
        images, tok, chat_template=template("<|vision_start|><|image_pad|><|vision_end|>")
    )
    tower = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    tower |= {
        "qwen2_vl": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "in_chans": 3},
        "qwen2_5_vl": {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        "qwen3_vl": {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "num_position_embeddings": 16}
        | {"deepstack_visual_indexes": [0]},
    }[kind]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    more = {"head_dim": 8, "rope_parameters": rope | {"mrope_interleaved": True}} if kind == "qwen3_vl" else {"rope_parameters": rope}
    ids = _ids(tok, ["vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"], _QWEN)
    return processor, AutoConfig.for_model(kind, vision_config=tower, text_config=_text(tok, **more), **ids)


def _gemma3():
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tok = _tokenizer(extra_special_tokens=dict(zip(("boi_token", "eoi_token", "image_token"), _GEMMA, strict=True)))
    processor = Gemma3Processor(Gemma3ImageProcessorPil(size=_SIDE), tok, template("<start_of_image>"), image_seq_length=4)
    layers = ["sliding_attention", "full_attention"]
    text = _text(tok, head_dim=8, sliding_window=6, layer_types=layers, query_pre_attn_scalar=8)
    ids = _ids(tok, ["boi_token_index", "eoi_token_index", "image_token_index"], _GEMMA)
    return processor, AutoConfig.for_model(
        "gemma3", vision_config=_TOWER, text_config=text, mm_tokens_per_image=4, tie_word_embeddings=False, **ids
    )


def checkpoint(kind, folder, seed=0):
    """A directory in hub layout with a random network of one of :data:`KINDS` or :data:`MORE`, and its processor.

    Its last token means the same as a picture's: where an answer holds that, a pass with pixels would take it for one more picture.
    """
    others = {"llava": _llava, "gemma3": _gemma3, "llava_next": _llava_next, "idefics3": _idefics3}
    processor, config = others[kind]() if kind in others else _qwen(kind)
    torch.manual_seed(seed)
    network = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").float().eval()
    randomise(network, seed)
    with torch.no_grad():
        table = network.get_input_embeddings().weight
        table[-1] = table[config.image_token_id]
    network.generation_config.pad_token_id = 0
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed=0, height=40, width=60):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def data_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def asking(text, *images):
    """One user message with pictures before its text."""
    return [{"role": "user", "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]}]


def processed(folder, conversation, **settings):
    """What transformers' own processor makes of a conversation, for ``generate``."""
    turns = [t if isinstance(t["content"], list) else {**t, "content": [{"type": "text", "text": t["content"]}]} for t in conversation]
    return load_processor(folder, AutoConfig.from_pretrained(folder)).apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", **{"add_generation_prompt": True, **settings}
    )


class WithPictures:
    """A network that reads the pictures of one prompt in every pass, without a cache: for ``naive``."""

    def __init__(self, network, inputs):
        self.network = network
        self.inputs = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        self.length = inputs["input_ids"].shape[1]
        self.aligned = [name for name in self.inputs if name.endswith("token_type_ids")]

    def __call__(self, input_ids):
        given, text = dict(self.inputs), self.network.config.text_config
        answer = input_ids[:, self.length :]
        answer = answer.where(answer != self.network.config.image_token_id, text.vocab_size - 1)
        input_ids = torch.cat([input_ids[:, : self.length], answer], 1)
        for name in self.aligned:
            value = given[name][:, : input_ids.shape[1]]
            given[name] = torch.cat([value, value.new_zeros(1, input_ids.shape[1] - value.shape[1])], 1)
        if hasattr(self.network.model, "rope_deltas"):
            self.network.model.rope_deltas = None
        out = self.network(input_ids=input_ids, use_cache=False, **given)
        if hasattr(self.network.model, "rope_deltas"):
            self.network.model.rope_deltas = None
        return out


class BehindOwnPrompt:
    """A network that reads another prompt than the base's ``length`` tokens; its outputs lie where the base's would."""

    def __init__(self, network, length, prompt):
        self.network, self.length, self.prompt = network, length, list(prompt)

    def __call__(self, input_ids):
        answer = input_ids[0, self.length :].tolist()
        logits = self.network(input_ids=torch.tensor([self.prompt + answer], device=device_of(self.network))).logits
        out = logits.new_zeros(1, self.length + len(answer), logits.shape[2])
        out[:, self.length - 1 :] = logits[:, len(self.prompt) - 1 :]
        return SimpleNamespace(logits=out)
