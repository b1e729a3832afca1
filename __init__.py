"""Shipyard: from text to a served language model, with a certificate at every stage.

Importing the package imports nothing else: heavy libraries load in the command that needs them.
"""

__version__ = "0.1.0"
