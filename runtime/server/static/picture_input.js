// Take picture files: opened, pasted or dropped.

/**
 * Call `take` with each file that is given to the page, and `refuse` with words if it is no picture.
 * @param {HTMLInputElement} input where files are opened
 * @param {HTMLElement} target marked while a file is dragged over the page
 */
export function listenForPictures(input, target, take, refuse) {
  const choose = (files) => {
    const picture = [...files].find((file) => file.type.startsWith("image/"));
    if (picture) take(picture);
    else if (files.length) refuse(`“${files[0].name}” is not a picture. JPEG, PNG and WebP are.`);
  };
  input.addEventListener("change", () => {
    choose(input.files);
    input.value = ""; // the same file may be opened again
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData?.files.length) {
      event.preventDefault();
      choose(event.clipboardData.files);
    }
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    target.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) target.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    target.classList.remove("over");
    choose(event.dataTransfer?.files ?? []);
  });
}

/** Return a file as a data URI. */
export function dataUrl(blob) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new Error("The file cannot be read any more. Open it again."));
    reader.readAsDataURL(blob);
  });
}
