"""Which Linear layers of HiDream an adapter selects, and how many numbers it trains there, from its configuration.

The control plane has no torch, so the module tree is written down here as diffusers builds it; the rules of the
selection are shared with the worker (`reverie_common.lycoris_presets`). A test holds the tree against diffusers itself.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from reverie_common.lycoris_presets import Node, select_modules

from reverie_trainer.jobs.admission.adapter_counts import is_split, lora_parameters, module_parameters, settings_of
from reverie_trainer.jobs.spec import Adapter, FullRank, LokrAdapter, LoraAdapter, LycorisAdapter

_SWIGLU_MULTIPLE = 256
_TIMESTEP_CHANNELS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """The part of `transformer/config.json` that shapes the model (spec 1.4)."""

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    caption_channels: tuple[int, int]
    text_emb_dim: int
    num_routed_experts: int
    llama_layers: tuple[int, ...]
    max_resolution: tuple[int, int]
    num_activated_experts: int = 2

    @classmethod
    def from_json(cls, config: Mapping[str, object]) -> "TransformerConfig":
        """Read a parsed `config.json`; raises ValueError naming the key that is missing or wrong."""
        return cls(
            patch_size=_integer(config, "patch_size"),
            in_channels=_integer(config, "in_channels"),
            # diffusers lets the number of output channels follow the input's.
            out_channels=_integer(config, "out_channels" if config.get("out_channels") is not None else "in_channels"),
            num_layers=_integer(config, "num_layers"),
            num_single_layers=_integer(config, "num_single_layers"),
            attention_head_dim=_integer(config, "attention_head_dim"),
            num_attention_heads=_integer(config, "num_attention_heads"),
            caption_channels=_pair(config, "caption_channels"),
            text_emb_dim=_integer(config, "text_emb_dim"),
            num_routed_experts=_integer(config, "num_routed_experts"),
            llama_layers=_integers(config, "llama_layers"),
            max_resolution=_pair(config, "max_resolution"),
            num_activated_experts=_integer(config, "num_activated_experts"),
        )

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.attention_head_dim * self.num_attention_heads

    @property
    def max_pixels(self) -> int:
        """Pixels of the largest picture that is not square: 8 pixels to a latent pixel (spec 0.1, decision 10)."""
        return self.max_resolution[0] * 8 * self.max_resolution[1] * 8

    @property
    def max_image_tokens(self) -> int:
        """Tokens that a picture that is not square is padded to (spec 1.6)."""
        return self.max_resolution[0] * self.max_resolution[1] // self.patch_size**2


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleNode:
    """One module of the transformer."""

    name: str
    """Dotted name, as in `named_modules()`."""
    class_name: str
    """Name of its class."""
    shape: tuple[int, int] | None = None
    """(out_features, in_features) of a Linear; None for every other module."""
    has_bias: bool = False
    """Whether a Linear has a bias."""
    num_own_parameters: int = 0
    """Parameters that the module holds itself and that are no Linear's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSelection:
    """What an adapter changes."""

    names: tuple[str, ...]
    """Dotted names of the Linear layers, in the order of LyCORIS."""
    num_parameters: int
    """Trainable parameters."""
    unmatched: tuple[str, ...] = field(default=())
    """Classes and patterns of the preset that match nothing."""
    split: tuple[str, ...] = field(default=())
    """Those whose LoKr has a factor that is itself a product of two."""

    @property
    def num_modules(self) -> int:
        """Number of Linear layers that are changed."""
        return len(self.names)


def select_adapter(config: TransformerConfig, adapter: Adapter) -> AdapterSelection:
    """Return the Linear layers that `adapter` changes in a HiDream transformer of `config` (spec 4.2, 4.3, 4.8).

    Raises:
        ValueError: BOFT cannot split a selected layer, or an option is no word of its type.
    """
    if isinstance(adapter, FullRank):
        names = tuple(module.name for module in enumerate_modules(config) if module.shape is not None)
        return AdapterSelection(names=names, num_parameters=num_transformer_parameters(config))
    if isinstance(adapter, LoraAdapter):
        return _select_lora(config, adapter)
    return _select_lycoris(config, adapter)


def _select_lora(config: TransformerConfig, adapter: LoraAdapter) -> AdapterSelection:
    matched: set[str] = set()
    selected: dict[str, int] = {}
    for module in enumerate_modules(config):
        ends = {end for end in adapter.target_modules if module.name == end or module.name.endswith(f".{end}")}
        if module.shape is not None and ends:
            matched |= ends
            selected[module.name] = lora_parameters(module.shape, adapter)
    unmatched = sorted(set(adapter.target_modules) - matched)
    return AdapterSelection(names=tuple(selected), num_parameters=sum(selected.values()), unmatched=tuple(unmatched))


def _select_lycoris(config: TransformerConfig, adapter: LokrAdapter | LycorisAdapter) -> AdapterSelection:
    modules = {module.name: module for module in enumerate_modules(config)}
    nodes = (
        Node(name=module.name, class_name=module.class_name, is_linear=module.shape is not None)
        for module in modules.values()
    )
    selection = select_modules(nodes, adapter.apply_preset)
    num_parameters = 0
    split = []
    for item in selection.modules:
        module = modules[item.name]
        if module.shape is not None:
            settings = settings_of(adapter, item.overrides)
            num_parameters += module_parameters(module.shape, module.has_bias, settings)
            if settings.algo == "lokr" and is_split(module.shape, settings):
                split.append(item.name)
    return AdapterSelection(
        names=tuple(item.name for item in selection.modules),
        num_parameters=num_parameters,
        unmatched=selection.unmatched,
        split=tuple(split),
    )


def num_transformer_parameters(config: TransformerConfig) -> int:
    """Return the number of parameters of the whole transformer."""
    total = 0
    for module in enumerate_modules(config):
        total += module.num_own_parameters
        if module.shape is not None:
            out_features, in_features = module.shape
            total += out_features * in_features + (out_features if module.has_bias else 0)
    return total


def swiglu_width(hidden: int) -> int:
    """Return the inner width of a feed-forward that is built for `hidden` (spec 1.4)."""
    return _SWIGLU_MULTIPLE * -(-(2 * hidden // 3) // _SWIGLU_MULTIPLE)


def enumerate_modules(config: TransformerConfig) -> Iterator[ModuleNode]:
    """Yield the transformer's modules that hold parameters or contain such, parents first."""
    width = config.width
    patch = config.patch_size**2
    yield ModuleNode(name="", class_name="HiDreamImageTransformer2DModel")
    yield ModuleNode(name="t_embedder", class_name="HiDreamImageTimestepEmbed")
    yield from _embedding("t_embedder.timestep_embedder", _TIMESTEP_CHANNELS, width)
    yield ModuleNode(name="p_embedder", class_name="HiDreamImagePooledEmbed")
    yield from _embedding("p_embedder.pooled_embedder", config.text_emb_dim, width)
    yield ModuleNode(name="x_embedder", class_name="HiDreamImagePatchEmbed")
    yield _linear("x_embedder.proj", width, config.in_channels * patch)
    yield ModuleNode(name="double_stream_blocks", class_name="ModuleList")
    for index in range(config.num_layers):
        yield from _block(config, f"double_stream_blocks.{index}", double=True)
    yield ModuleNode(name="single_stream_blocks", class_name="ModuleList")
    for index in range(config.num_single_layers):
        yield from _block(config, f"single_stream_blocks.{index}", double=False)
    yield ModuleNode(name="final_layer", class_name="HiDreamImageOutEmbed")
    yield _linear("final_layer.linear", patch * config.out_channels, width)
    yield ModuleNode(name="final_layer.adaLN_modulation", class_name="Sequential")
    yield _linear("final_layer.adaLN_modulation.1", 2 * width, width)
    yield from _caption_projections(config)


def _linear(name: str, out_features: int, in_features: int, *, has_bias: bool = True) -> ModuleNode:
    return ModuleNode(name=name, class_name="Linear", shape=(out_features, in_features), has_bias=has_bias)


def _embedding(name: str, in_features: int, width: int) -> Iterator[ModuleNode]:
    yield ModuleNode(name=name, class_name="TimestepEmbedding")
    yield _linear(f"{name}.linear_1", width, in_features)
    yield _linear(f"{name}.linear_2", width, width)


def _block(config: TransformerConfig, name: str, *, double: bool) -> Iterator[ModuleNode]:
    width = config.width
    path = f"{name}.block"
    yield ModuleNode(name=name, class_name="HiDreamBlock")
    kind = "HiDreamImageTransformerBlock" if double else "HiDreamImageSingleTransformerBlock"
    yield ModuleNode(name=path, class_name=kind)
    yield ModuleNode(name=f"{path}.adaLN_modulation", class_name="Sequential")
    yield _linear(f"{path}.adaLN_modulation.1", (12 if double else 6) * width, width)
    yield from _attention(f"{path}.attn1", width, double=double)
    yield from _mixture(config, f"{path}.ff_i")
    if double:
        yield from _swiglu(f"{path}.ff_t", width, 4 * width)


def _attention(name: str, width: int, *, double: bool) -> Iterator[ModuleNode]:
    streams = ("", "_t") if double else ("",)
    # The query and key norms hold one number for each channel.
    yield ModuleNode(name=name, class_name="HiDreamAttention", num_own_parameters=2 * width * len(streams))
    for stream in streams:
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            yield _linear(f"{name}.{projection}{stream}", width, width)


def _mixture(config: TransformerConfig, name: str) -> Iterator[ModuleNode]:
    width = config.width
    yield ModuleNode(name=name, class_name="MOEFeedForwardSwiGLU")
    yield from _swiglu(f"{name}.shared_experts", width, 2 * width)
    yield ModuleNode(name=f"{name}.experts", class_name="ModuleList")
    for index in range(config.num_routed_experts):
        yield from _swiglu(f"{name}.experts.{index}", width, 4 * width)
    # The gate is a Parameter and not a Linear.
    yield ModuleNode(name=f"{name}.gate", class_name="MoEGate", num_own_parameters=config.num_routed_experts * width)


def _swiglu(name: str, width: int, hidden: int) -> Iterator[ModuleNode]:
    inner = swiglu_width(hidden)
    yield ModuleNode(name=name, class_name="HiDreamImageFeedForwardSwiGLU")
    yield _linear(f"{name}.w1", inner, width, has_bias=False)
    yield _linear(f"{name}.w2", width, inner, has_bias=False)
    yield _linear(f"{name}.w3", inner, width, has_bias=False)


def _caption_projections(config: TransformerConfig) -> Iterator[ModuleNode]:
    t5_channels, llama_channels = config.caption_channels
    channels = [llama_channels] * (config.num_layers + config.num_single_layers) + [t5_channels]
    yield ModuleNode(name="caption_projection", class_name="ModuleList")
    for index, in_features in enumerate(channels):
        yield ModuleNode(name=f"caption_projection.{index}", class_name="TextProjection")
        yield _linear(f"caption_projection.{index}.linear", config.width, in_features, has_bias=False)


def _integer(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ValueError(f"transformer/config.json: {key} is {value!r}, expected a whole number")
    return value


def _integers(config: Mapping[str, object], key: str) -> tuple[int, ...]:
    value = config.get(key)
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise ValueError(f"transformer/config.json: {key} is {value!r}, expected a list of whole numbers")
    return tuple(value)


def _pair(config: Mapping[str, object], key: str) -> tuple[int, int]:
    values = _integers(config, key)
    if len(values) != 2:
        raise ValueError(f"transformer/config.json: {key} has {len(values)} entries, expected 2")
    return values[0], values[1]
