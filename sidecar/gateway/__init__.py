"""A face for OpenAI gateways: `vllm.grpc.engine.VllmEngine` over our own Generation. Imported only when it is switched on.

sampling    their request as ours: mapped, or refused by name
answers     our events as theirs
servicer    the RPCs
"""
