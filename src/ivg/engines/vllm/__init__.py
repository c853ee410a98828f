"""Guidance inside vLLM: a composite model, its plugin, and the engine over it. vllm is imported in this package only.

================  ===========================================================================
``config``        what a composite is: parts, groups of guides, where the weights are
``pack``          writes the directory of a composite; reads no weights
``plugin``        vLLM's entry point (``vllm.general_plugins``)
``parts``         one network of vLLM's as a part of ours
``model``         the composite: base and guides over the same tokens, logits mixed at the end
``rows``          which row of a batch has which guidance weights
``processor``     reads the weights of a request (model runners V1 and V2), checks them in the front end
``runner_v2``     hands them to the model, model runner V2
``value_model``   a value network's backbone, for the pooling engine
``core``          vLLM's engine core: requests in, results out, death and revival
``engine``        ``types.AsyncEngine`` over the composite
``value``         an explicit value that a pooling engine reads
================  ===========================================================================
"""
