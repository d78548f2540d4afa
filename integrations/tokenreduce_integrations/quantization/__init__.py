"""Quantization of weights, through transformers' own configurations."""

from tokenreduce.hookspecs import Register, hookimpl


@hookimpl
def register_quantizers(register: Register) -> None:
    """Register the built-in quantizers."""
    here = "tokenreduce_integrations.quantization"
    for name, quantizer, extra, summary in (
        ("torchao", "ao:TorchAO", "quant", "int8, intx and float8 on CPU and CUDA"),
        ("bitsandbytes", "bnb:BitsAndBytes", "quant", "int8, nf4 and fp4 on CPU and CUDA"),
        ("quanto", "quanto:Quanto", "quanto", "int8, int4 and float8 on CPU and CUDA"),
    ):
        register(name, f"{here}.{quantizer}", extra=extra, summary=summary)
