// A place of the page that takes a picture: dropped, pasted, or chosen. Gradio runs this and what
// follows it (page_card.js, page_control.js) once for each, with `element`, `trigger`, `props` and
// `watch` as its own (gr.HTML). Pictures are data URLs, so that no file and no address ever travels.
// Event: "upload" brings a new file.

const part = (name) => element.querySelector("[data-part=" + name + "]");
const [drop, chooser, stage, another, note] = ["drop", "chooser", "stage", "another", "note"].map(part);

function bring(file) {
  if (!file) {
    note.textContent = "that is no file: save the picture, then drop or choose it";
    return;
  }
  if (file.size > props.most_bytes) {
    const mib = (file.size / 2 ** 20).toFixed(1);
    note.textContent = file.name + ": " + mib + " MiB; make it smaller than " + (props.most_bytes / 2 ** 20).toFixed(1) + " MiB";
    return;
  }
  note.textContent = "reading " + file.name + " …";
  const reader = new FileReader();
  reader.onload = () => {
    note.textContent = "";
    trigger("upload", { name: file.name, image: reader.result });
  };
  reader.onerror = () => { note.textContent = file.name + ": cannot be read"; };
  reader.readAsDataURL(file);
}

chooser.addEventListener("change", () => {
  if (chooser.files.length) bring(chooser.files[0]);
  chooser.value = ""; // the same file once more is a change again
});
another.addEventListener("click", () => chooser.click());
drop.addEventListener("click", () => chooser.click());
element.addEventListener("dragover", (event) => {
  event.preventDefault();
  element.classList.add("over");
});
element.addEventListener("dragleave", () => element.classList.remove("over"));
element.addEventListener("drop", (event) => {
  event.preventDefault();
  element.classList.remove("over");
  bring(event.dataTransfer.files[0]);
});
element.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  bring(event.clipboardData.files[0]);
});
