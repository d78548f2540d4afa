"""Registration of the adapter; read whenever a model is looked up."""

from tokenreduce import hookimpl

#: The version of the plugin interface that this package was written for.
tokenreduce_api = 1


@hookimpl
def register_model_adapters(register):
    """The adapter, and how pipelines load the model."""
    register(
        "pebble",
        "tokenreduce_pebble.adapter:PebbleAdapter",
        # What ships with a model lives in a module whose name changes with the files.
        models=("transformers_modules.*.modeling_pebble.PebbleForConditionalGeneration",),
        loader="tokenreduce_pebble.loading:load_model",
        summary="Pebble, whose code ships with it; images of any size",
    )
