// The dialogue that asks for the server's token, once for all questions that need it.
import { $ } from "./dom.js";
import { openSession } from "./http.js";

let waiting = null;

/** Returns when there is a session. */
export function signIn() {
  waiting ??= new Promise((signedIn) => {
    $("sign-in").addEventListener("cancel", (event) => event.preventDefault());
    $("sign-in-form").onsubmit = (event) => {
      event.preventDefault();
      submit(signedIn);
    };
    $("sign-in").showModal();
  }).finally(() => (waiting = null));
  return waiting;
}

async function submit(signedIn) {
  try {
    await openSession($("token").value);
  } catch (error) {
    $("token-fault").textContent = error.status === 401 ? "This is not the token." : error.message;
    return $("token").select();
  }
  $("token").value = "";
  $("token-fault").textContent = "";
  $("sign-in").close();
  signedIn();
}
