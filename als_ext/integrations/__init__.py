"""als_ext in other people's trainers and tables. Nothing here is imported by ``import als_ext``.

One module a framework, named after it: ``sklearn``, ``skorch``, ``transformers``, ``lightning``,
``cleanlab``, ``tables``; ``also`` has the optimizer for any trainer that calls ``step()`` by
itself. Each imports its framework when it is imported, and says which extra brings it where it is
missing.
"""
