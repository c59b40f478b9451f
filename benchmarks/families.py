"""Model families, each as a tiny model with random weights: what attention it has, and what is expected of it.

Heads and head_dims are those of the models that people serve, where that is cheap; depth, width, vocabulary, experts
and windows are cut down. A family is written down here once. `benchmarks.architectures` runs it, `docs/models.md` lists
it, and tests take one of each kind. Over 400 lines: a table, one entry per family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sawkv.capacity.model import Attention, read_shape
from sawkv.errors import UnsupportedError

WINDOW: Final = 64
"""Tokens of each sliding window, fewer than the prompts have."""

_SMALL: Final[dict[str, Any]] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,  # sharp softmax
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_WINDOWED: Final = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA: Final = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
_DEEPSEEK: Final[dict[str, Any]] = {
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 4,
    "n_group": 1,
    "topk_group": 1,
}
_GDN: Final[dict[str, Any]] = {
    "head_dim": 256,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS: Final = {
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 128,
}
_MAMBA2: Final[dict[str, Any]] = {
    "mamba_n_heads": 16,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}
_GEMMA4: Final[dict[str, Any]] = {
    **_WINDOWED,
    **_GEMMA,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 1024,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_kv_shared_layers": 0,
}
_VISION: Final = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_heads": 2,
    "intermediate_size": 64,
    "patch_size": 14,
}

SERVED: Final = "served"


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        models: whose attention it stands for, in words.
        kind: what its layers are; families of one kind run through the same code.
        architecture: of `config.json`.
        changes: to the small model; those of a nested text config stand in its `text_config`.
        vllm: `SERVED`, or words of the refusal with sawkv's INT4, where vLLM alone serves the family.
        not_on_cpu: words of vLLM's own error on its CPU build, where it does not serve the family.
        not_on_gpu: the same on Hopper.
        needs: a package that vLLM's file of the model imports and tools/setup_env.py leaves out, as it needs the CPU
            build of torch that the package index does not hold. Without it vLLM does not serve the family.
        cache: the same for a SawCache in Transformers.
        dtype: the one in which vLLM's CPU build serves it.
        options: for every engine of it.
        blocks: of a CPU engine that has too few for all requests at once; 0 where there are enough.
    """

    models: str
    kind: str
    architecture: str
    changes: Mapping[str, Any]
    vllm: str = SERVED
    not_on_cpu: str = ""
    not_on_gpu: str = ""
    needs: str = ""
    cache: str = SERVED
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    blocks: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """Of the tiny model."""
        changes = dict(self.changes)
        if "text_config" in changes:
            changes["text_config"] = _SMALL | changes["text_config"]
            return {"architectures": [self.architecture], "tie_word_embeddings": False} | changes
        return {"architectures": [self.architecture]} | _SMALL | changes

    @property
    def text_config(self) -> dict[str, Any]:
        """Of its language model."""
        config = self.config
        text: dict[str, Any] = config.get("text_config", config)
        return text

    @property
    def head_dims(self) -> set[int]:
        """Of the layers with attention."""
        return {layer.head_dim for layer in self._attention}

    @property
    def heads(self) -> str:
        """Head_dims and KV heads, as a word for each kind of layer."""
        return ", ".join(dict.fromkeys(f"d{layer.head_dim}/kv{layer.num_kv_heads}" for layer in self._attention))

    @property
    def _attention(self) -> Sequence[Attention]:
        try:
            return read_shape(self.config, language_model_only=True).attention
        except UnsupportedError:  # sawkv serves no such layers
            text = self.text_config
            return (
                []
                if "kv_lora_rank" in text
                else [Attention(text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"])]
            )


def _dense(models: str, architecture: str, model_type: str, **changes: Any) -> Family:
    given = {
        name: changes.pop(name)
        for name in ("kind", "vllm", "not_on_cpu", "not_on_gpu", "needs", "cache", "dtype", "options", "blocks")
        if name in changes
    }
    return Family(models, given.pop("kind", "dense"), architecture, {"model_type": model_type} | changes, **given)


_MLA_REFUSED: Final = "MLA (multi-head latent attention)"
_MLA_CACHE: Final = "multi-head latent attention (kv_lora_rank)"

FAMILIES: Final[dict[str, Family]] = {
    "llama-3": _dense("Llama 2 and 3, InternLM3, Seed-Coder", "LlamaForCausalLM", "llama", initializer_range=0.06),
    "qwen2.5": _dense(
        "Qwen 2 and 2.5",
        "Qwen2ForCausalLM",
        "qwen2",
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.06,
    ),
    "qwen3": _dense("Qwen 3", "Qwen3ForCausalLM", "qwen3"),
    "ministral-3": _dense("Ministral 3", "Ministral3ForCausalLM", "ministral3", initializer_range=0.06),
    "phi-3": _dense(
        "Phi 3 mini",
        "Phi3ForCausalLM",
        "phi3",
        head_dim=96,
        hidden_size=192,
        num_attention_heads=2,
        original_max_position_embeddings=4096,
    ),
    "phi-2": _dense(
        "Phi 2", "PhiForCausalLM", "phi", head_dim=80, hidden_size=320, num_key_value_heads=4, initializer_range=0.06
    ),
    "gpt-2": _dense("GPT-2", "GPT2LMHeadModel", "gpt2", head_dim=64, num_key_value_heads=4, tie_word_embeddings=True),
    "opt": _dense(
        "OPT",
        "OPTForCausalLM",
        "opt",
        head_dim=64,
        num_key_value_heads=4,
        ffn_dim=512,
        word_embed_proj_dim=256,
        tie_word_embeddings=True,
    ),
    "pythia": _dense(
        "Pythia, GPT-NeoX", "GPTNeoXForCausalLM", "gpt_neox", num_key_value_heads=4, head_dim=64, initializer_range=0.06
    ),
    "olmo-2": _dense("OLMo 2", "Olmo2ForCausalLM", "olmo2", head_dim=64),
    "hunyuan": _dense("Hunyuan dense", "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense"),
    "ernie-4.5": _dense("ERNIE 4.5 dense", "Ernie4_5ForCausalLM", "ernie4_5", initializer_range=0.06),
    "seed-oss": _dense("Seed-OSS", "SeedOssForCausalLM", "seed_oss", initializer_range=0.06),
    "starcoder-2": _dense("StarCoder 2", "Starcoder2ForCausalLM", "starcoder2", head_dim=64, sliding_window=None),
    "smollm-3": _dense(
        "SmolLM 3, layers without RoPE", "SmolLM3ForCausalLM", "smollm3", head_dim=64, initializer_range=0.06
    ),
    "granite-3": _dense(
        "Granite 3", "GraniteForCausalLM", "granite", head_dim=64, attention_multiplier=0.125, initializer_range=0.06
    ),
    "apertus": _dense("Apertus", "ApertusForCausalLM", "apertus", head_dim=64, hidden_act="xielu"),
    "stablelm": _dense("StableLM", "StableLmForCausalLM", "stablelm", head_dim=64, initializer_range=0.06),
    "qwen3-moe": _dense(
        "Qwen 3 MoE",
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        kind="MoE",
        **(_EXPERTS | {"shared_expert_intermediate_size": 0}),  # else vLLM makes one, with weights that nobody wrote
        norm_topk_prob=True,
    ),
    "qwen2-moe": _dense(
        "Qwen 2 MoE", "Qwen2MoeForCausalLM", "qwen2_moe", kind="MoE", **_EXPERTS, head_dim=64, initializer_range=0.06
    ),
    "mixtral": _dense(
        "Mixtral",
        "MixtralForCausalLM",
        "mixtral",
        kind="MoE",
        num_local_experts=8,
        sliding_window=None,
        initializer_range=0.06,
    ),
    "minimax-m2": _dense(
        "MiniMax M2",
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        kind="MoE",
        num_local_experts=8,
        num_experts_per_tok=2,
        rotary_dim=64,
        initializer_range=0.06,
        scoring_func="sigmoid",
        use_routing_bias=True,
        not_on_cpu="AssertionError",  # its experts on a CPU take no such bias
    ),
    "glm-4.5": _dense(
        "GLM 4.5, 4.6, 4.7",
        "Glm4MoeForCausalLM",
        "glm4_moe",
        kind="MoE",
        partial_rotary_factor=0.5,
        use_qk_norm=True,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=128,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "ernie-4.5-moe": _dense(
        "ERNIE 4.5 MoE",
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        kind="MoE",
        moe_num_experts=8,
        moe_k=2,
        moe_intermediate_size=128,
        moe_layer_start_index=1,
        initializer_range=0.06,
    ),
    "mistral": _dense(
        "Mistral 7B", "MistralForCausalLM", "mistral", kind="window", sliding_window=WINDOW, initializer_range=0.06
    ),
    "olmo-3": _dense("OLMo 3", "Olmo3ForCausalLM", "olmo3", kind="window", **_WINDOWED, head_dim=64),
    "command-r": _dense(
        "Command R7B, Command A", "Cohere2ForCausalLM", "cohere2", kind="window", **_WINDOWED, logit_scale=1.0
    ),
    "exaone-4": _dense("EXAONE 4", "Exaone4ForCausalLM", "exaone4", kind="window", **_WINDOWED),
    "gemma-3": _dense(
        "Gemma 3 1B", "Gemma3ForCausalLM", "gemma3_text", kind="window", **_WINDOWED, **_GEMMA, head_dim=256
    ),
    "gemma-3-vl": _dense(
        "Gemma 3 4B to 27B, without images",
        "Gemma3ForConditionalGeneration",
        "gemma3",
        kind="images in both directions",
        text_config={"model_type": "gemma3_text", **_WINDOWED, **_GEMMA},
        vision_config=_VISION
        | {"model_type": "siglip_vision_model", "num_hidden_layers": 1, "image_size": 28, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=1020,
        boi_token_index=1021,
        eoi_token_index=1022,
        tie_word_embeddings=True,
        needs="torchvision",
        options={"language_model_only": True},
    ),
    "gemma-2": _dense(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "gemma2",
        kind="soft-cap",
        **_WINDOWED,
        **_GEMMA,
        head_dim=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "gpt-oss": _dense(
        "gpt-oss",
        "GptOssForCausalLM",
        "gpt_oss",
        kind="sink",
        **_WINDOWED,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        intermediate_size=256,
        initializer_range=0.06,
    ),
    "qwen3-next": _dense(
        "Qwen3-Next",
        "Qwen3NextForCausalLM",
        "qwen3_next",
        kind="gated delta net",
        dtype="bfloat16",
        blocks=20,
        **_GDN,
        **_EXPERTS,
    ),
    "qwen3.5": _dense(
        "Qwen 3.5, 3.6",
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        kind="gated delta net",
        needs="torchvision",
        dtype="bfloat16",
        **_GDN,
    ),
    "qwen3.5-moe": _dense(
        "Qwen 3.5 MoE",
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        kind="gated delta net",
        needs="torchvision",
        dtype="bfloat16",
        **_GDN,
        **_EXPERTS,
    ),
    "granite-4-h": _dense(
        "Granite 4 H",
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        kind="Mamba 2",
        blocks=22,
        **_MAMBA2,
        num_attention_heads=2,
        layer_types=["mamba", "mamba", "attention", "mamba"],
        shared_intermediate_size=512,
        num_local_experts=0,
        attention_multiplier=0.125,
    ),
    "nemotron-h": _dense(
        "Nemotron-H, Nemotron Nano 2",
        "NemotronHForCausalLM",
        "nemotron_h",
        kind="Mamba 2",
        hybrid_override_pattern="M*-M",
        mamba_num_heads=16,
        mamba_head_dim=32,
        n_groups=1,
        ssm_state_size=8,
        conv_kernel=4,
        chunk_size=64,
        mamba_ssm_cache_dtype="float32",
    ),
    "falcon-h1": _dense(
        "Falcon-H1",
        "FalconH1ForCausalLM",
        "falcon_h1",
        kind="Mamba 2 and attention in each layer",
        **_MAMBA2,
        mamba_d_ssm=512,
        initializer_range=0.05,
    ),
    "zamba2": _dense(
        "Zamba2",
        "Zamba2ForCausalLM",
        "zamba2",
        kind="Mamba 2 and attention in each layer",
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        hybrid_layer_ids=[1, 3],
        n_mamba_heads=16,
        mamba_headdim=32,
        mamba_ngroups=1,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        chunk_size=64,
        num_mem_blocks=1,
        num_key_value_heads=4,
        initializer_range=0.05,
        tie_word_embeddings=True,
    ),
    "lfm-2": _dense(
        "LFM2",
        "Lfm2ForCausalLM",
        "lfm2",
        kind="short convolution",
        head_dim=64,
        layer_types=["conv", "full_attention"] * 2,
        conv_L_cache=3,
        conv_dim=256,
        conv_bias=False,
        block_dim=256,
        block_ff_dim=512,
        block_auto_adjust_ff_dim=False,
    ),
    "gemma-3n": _dense(
        "Gemma 3n",
        "Gemma3nForCausalLM",
        "gemma3n_text",
        kind="shared KV",
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        num_hidden_layers=6,
        num_kv_shared_layers=3,
        head_dim=256,
        intermediate_size=[512] * 6,
        laurel_rank=16,
        altup_num_inputs=2,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=1024,
        activation_sparsity_pattern=[0.0] * 6,
        tie_word_embeddings=True,
    ),
    "gemma-4": _dense(
        "Gemma 4 26B-A4B, 31B",
        "Gemma4ForCausalLM",
        "gemma4_text",
        kind="two head_dims",
        **_GEMMA4,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        use_bidirectional_attention="vision",  # among the tokens of an image, which this model cannot read
    ),
    "gemma-4-e": _dense(
        "Gemma 4 E2B, E4B",
        "Gemma4ForCausalLM",
        "gemma4_text",
        kind="two head_dims, shared KV",
        **_GEMMA4 | {"num_kv_shared_layers": 3},
    ),
    "qwen3-vl": _dense(
        "Qwen3-VL, without images",
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        kind="M-RoPE",
        text_config={
            "model_type": "qwen3_vl_text",
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        },
        vision_config=_VISION
        | {"model_type": "qwen3_vl", "depth": 1, "out_hidden_size": 256, "deepstack_visual_indexes": [0]},
        image_token_id=1020,
        video_token_id=1021,
        vision_start_token_id=1022,
        vision_end_token_id=1023,
        needs="torchvision",
        options={"language_model_only": True},
    ),
    "laguna": _dense(
        "Laguna",
        "LagunaForCausalLM",
        "laguna",
        kind="query heads by layer",
        **_WINDOWED,
        **_EXPERTS,
        num_attention_heads_per_layer=[4, 8] * 2,
        moe_routed_scaling_factor=1.0,
        initializer_range=0.06,
        not_on_cpu="AssertionError",  # as MiniMax M2
    ),
    "minicpm-3": _dense(
        "MiniCPM 3",
        "MiniCPM3ForCausalLM",
        "minicpm3",
        kind="K and V of each head from a latent",
        num_key_value_heads=4,
        head_dim=None,
        q_lora_rank=64,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        scale_emb=1,
        dim_model_base=256,
        scale_depth=1.4,
        initializer_range=0.06,
        cache=_MLA_CACHE,
    ),
    "olmo-hybrid": _dense(
        "OLMo Hybrid",
        "OlmoHybridForCausalLM",
        "olmo_hybrid",
        kind="gated delta net",
        not_on_cpu="set_allocator",  # of Triton
        not_on_gpu="There is no module or parameter named",  # the names of Transformers' file
        **_GDN | {"head_dim": 64, "num_key_value_heads": 4},
    ),
    "bamba": _dense(
        "Bamba, not in vLLM from 0.23",
        "BambaForCausalLM",
        "bamba",
        kind="Mamba 2",
        **_MAMBA2,
        num_attention_heads=2,
        attn_layer_indices=[2],
        not_on_cpu="does not dispatch through the Transformers attention interface",
        not_on_gpu="does not dispatch through the Transformers attention interface",
    ),
    "mimo-v2": _dense(
        "MiMo-V2",
        "MiMoV2FlashForCausalLM",
        "mimo_v2_flash",
        kind="sink, K and V of unlike head_dims",
        hybrid_layer_pattern=[1, 0] * 2,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=192,
        swa_v_head_dim=128,
        sliding_window_size=WINDOW,
        moe_layer_freq=[0] * 4,
        attention_value_scale=1.0,
        rope_theta=10000.0,
        swa_rope_theta=10000.0,
        layernorm_epsilon=1e-6,
        **_WINDOWED,
        **_EXPERTS,
        head_dim=192,
        v_head_dim=128,
        vllm="head_dim 128 of V apart from 192 of K",
        not_on_cpu="next_power_of_2",  # of Triton
        cache="expected K and V of one shape",
    ),
    "deepseek-v3.2": _dense(
        "DeepSeek V3.2, GLM 5",
        "DeepseekV32ForCausalLM",
        "deepseek_v32",
        kind="MLA",
        **_DEEPSEEK,
        index_n_heads=32,  # or 64: what kernels of a GPU take
        index_head_dim=128,
        index_topk=128,
        vllm=_MLA_REFUSED,
        not_on_cpu="Sparse Attention is not supported on CPU",
        cache=_MLA_CACHE,
    ),
    "deepseek-v3": _dense(
        "DeepSeek V3, R1, Kimi-K2",
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        kind="MLA",
        **_DEEPSEEK,
        vllm=_MLA_REFUSED,
        cache=_MLA_CACHE,
        options={"block_size": 16},
    ),
    "llama-4": _dense(
        "Llama 4, without images",
        "Llama4ForCausalLM",
        "llama4_text",
        kind="chunks",
        attention_chunk_size=128,
        no_rope_layers=[1, 1, 1, 0],
        intermediate_size_mlp=512,
        moe_layers=[],
        interleave_moe_layer_step=0,
        num_local_experts=8,
        vllm="attention in chunks (attention_chunk_size)",
        cache="layers of type chunked_attention",
    ),
    "bloom": _dense(
        "BLOOM",
        "BloomForCausalLM",
        "bloom",
        kind="ALiBi",
        head_dim=64,
        num_key_value_heads=4,
        n_layer=4,
        n_head=4,
        tie_word_embeddings=True,
        vllm="ALiBi",
        not_on_gpu="FlashAttention version not detected",
    ),
    "jamba": _dense(
        "Jamba",
        "JambaForCausalLM",
        "jamba",
        kind="Mamba 1",
        head_dim=64,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        use_mamba_kernels=False,
        mamba_d_state=16,
        mamba_d_conv=4,
        not_on_cpu="selective_scan_fwd",
    ),
}


def make_model(folder: Path, name: str) -> str:
    """Write a family's tiny model with random weights, by Transformers; returns its folder."""
    import torch
    import transformers
    from transformers import AutoConfig

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FAMILIES[name].config))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = getattr(transformers, FAMILIES[name].architecture)._from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("proj.bias", "sinks")):  # they start as zeros, which would hide an error
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return str(folder)
