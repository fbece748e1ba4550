"""A chat endpoint in OpenAI's format on loopback, over the engine of a run (`rollout.serve`): for agents that know only such an endpoint.

    request   what is asked, and what is refused
    reply     what is answered
    server    HTTP, and who may ask

docs/agents.md says what the endpoint can do. `verl.rl.agents` runs the agents, and makes answers of what they have asked.
"""
