// The image that the ControlNet follows. Runs after page_upload.js. The value is that of a card
// (page_card.js) without a mask and a query.

const picture = part("picture");

function show() {
  const image = JSON.parse(props.value || "{}").image || "";
  note.textContent = "";
  drop.hidden = !!image;
  stage.hidden = !image;
  if (image) picture.src = image;
}

picture.addEventListener("load", () => {
  const side = Math.max(picture.naturalWidth, picture.naturalHeight);
  picture.classList.toggle("small", side < 256);
});

part("remove").addEventListener("click", () => {
  props.value = "{}";
  show();
});
watch("value", show);
show();
