"""One generation, whoever runs the model: rows, passes, decisions and their effects. Imports no transformers.

Each module imports only those above it, and nobody points back (``tests/test_imports.py``):

==============  =====================================================================================================
``index``       scatter, mark, right-align: what is done with tables of indices
``inference``   tensors made in inference mode, outside of it
``kv_store``    ``RowStore``: buffers, layer groups, write, evict, reorder
``heads``       heads that several processes share
``layout``      which column sits in which row, its token type, what may see what
``attend``      attention and statistics of both kinds of pass; knows no policy
``cpu_step``    the same of a decode step on a CPU
``pool``        which tokens of each picture make the pool of retention ``pool``
``turn``        one ``generate()``: its bounds, what was there before it; reduced prompts
``passes``      ``DecodePass``, ``MultiTokenPass``: complete when made
``ranking``     by which prompt rows visual tokens are ranked
``decide``      the only caller of ``Policy.decide`` and of the selection by rank
``apply``       what a decision does: a list to read through, rows that move, a shrunk prompt, a mask for draft tokens
``record``      what ``stats()`` reads
``aside``       a second line of calls for what follows from a decision
``score_layer`` what happens in a score layer: measure, decide, apply, record
``session``     the order of events
==============  =====================================================================================================

An engine that keeps its own cache needs none of it but ``decide.choose``: tensors in, lists of kept tokens out.
"""
