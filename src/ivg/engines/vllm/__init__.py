"""Guidance inside vLLM: a composite model, its plugin, and the engine over it. vllm is imported in this package only.

================  ===========================================================================
``versions``      which vLLM is supported
``config``        config.json of a composite: submodels, groups of guides, where the weights are
``export``        writes the directory of a composite; reads no weights
``plugin``        vLLM's entry point (``vllm.general_plugins``)
``submodels``     builds and loads one network of a composite
``model``         the composite: base and guides over the same tokens, logits mixed at the end
``batch_betas``   guidance weights of the rows of the current batch
``processor``     reads the weights of a request (model runners V1 and V2), checks them in the front end
``model_runner``  hands them to the model, model runner V2
``value_model``   a value network's backbone, for the pooling engine
``client``        vLLM's engine: requests in, outputs out, restart when it stops
``engine``        an :class:`~ivg.types.AsyncEngine` over the composite
``value``         guides of the composite model; an explicit value in a pooling engine
================  ===========================================================================
"""
