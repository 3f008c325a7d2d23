"""The published world model: a compressive tokenizer and a Llama over its tokens.

Loads and writes the checkpoints of VLA-RFT (arXiv 2510.00406, section 3.2), whose design is that of
iVideoGPT (arXiv 2405.15223) and RLVR-World (arXiv 2505.13934). Parameters have the published names.
"""
