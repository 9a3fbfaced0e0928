// The page: which view is shown, and what they tell each other. Addresses: `#chat`, `#server`, `#api`, and with a request
// that is looked at `#server/ID`.

import { Chat } from "./chat.js";
import { ServerView } from "./server.js";
import { Status } from "./status.js";
import { StoryDialog } from "./story.js";

const VIEWS = ["chat", "server", "api"];

const story = new StoryDialog(document.getElementById("story"));
const chat = new Chat((id) => (location.hash = `chat/${encodeURIComponent(id)}`));
const status = new Status((isReady) => chat.ready(isReady));
const server = new ServerView((health) => status.tell(health));

let shown = "chat";

function show() {
  const [wanted, id = ""] = location.hash.slice(1).split("/");
  if (wanted === "main") {
    history.replaceState(null, "", `#${shown}`); // The link to the content has moved the focus; the view stays.
    return;
  }
  const view = VIEWS.includes(wanted) ? wanted : "chat";
  shown = view;
  for (const name of VIEWS) {
    document.getElementById(`view-${name}`).toggleAttribute("data-shown", name === view);
    const tab = document.querySelector(`.tabs [href="#${name}"]`);
    if (name === view) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
  server.watch(view === "server");
  story.show(decoded(id));
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

addEventListener("hashchange", show);
addEventListener("popstate", show);
show();
status.look();
