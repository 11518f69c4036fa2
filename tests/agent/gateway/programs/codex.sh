#!/bin/sh
# Codex against a gateway: turntrace run tasks.jsonl --agent './codex.sh {prompt}' ...
# CONTEXT_WINDOW: tokens after which it compacts its context.
HOME=$(mktemp -d) && export HOME && trap 'rm -rf "$HOME"' EXIT
export CODEX_HOME="$HOME/.codex" && mkdir -p "$CODEX_HOME"
window=${CONTEXT_WINDOW:-200000}
cat > "$CODEX_HOME/config.toml" <<END
model = "m"
model_provider = "turntrace"
model_context_window = $window
model_auto_compact_token_limit = $((window * 9 / 10))
check_for_update_on_startup = false

[analytics]
enabled = false

[model_providers.turntrace]
name = "turntrace"
base_url = "$OPENAI_BASE_URL"
wire_api = "responses"
env_key = "OPENAI_API_KEY"
END
codex exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox "$1"
